# Each target works on a fresh Debian machine with Rust: compose/setup.sh installs what is missing, and is quick when
# nothing is.

.DEFAULT_GOAL := help
.PHONY: help demo up test api-test loadtest release bench prepare render setup binaries

# `make demo PROFILE=release` for optimised binaries.
PROFILE ?= dev
# `make up FIRST_PORT=8080` for ports that stay the same.
FIRST_PORT ?=
# `make bench ONLY=append_http,relay PAIRS=9`; CHECK=yes fails when a goal is missed.
ONLY ?=
PAIRS ?= 7
# Events of the backlog that `project_documents` works off.
PROJECT_EVENTS ?= 100000
# Events of the log that `rebuild` reads; EVENTS=10000000 PAIRS=1 is the full one.
EVENTS ?= 500000
CHECK ?=
# `make api-test API_SEED=7` for the requests of another run.
API_SEED ?= 1
# Seconds of load.
DURATION_S ?= 30

# Tests mostly wait for servers, so that more of them than cores run at once.
TEST_THREADS ?= 8

target := target/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
ports := $(if $(FIRST_PORT),--first-port $(FIRST_PORT))
tools := $(or $(TIDEMARK_TOOLS),.tools)

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: binaries ## Three regions, the read-your-writes story step by step, a clean stop
	$(target)/local demo $(ports)

up: binaries ## Three regions that stay up, with their addresses
	$(target)/local up $(ports)

test: binaries ## All tests
	SQLX_OFFLINE=true RUST_TEST_THREADS=$(TEST_THREADS) \
		cargo test --workspace --locked --profile $(if $(filter dev,$(PROFILE)),test,$(PROFILE))

loadtest: binaries ## A k6 run against three regions while their links lag and break
	DURATION_S=$(DURATION_S) $(target)/local run $(ports) -- $(tools)/bin/k6 run --quiet loadtest/lag.js

api-test: binaries ## Requests made from /openapi.json, and answers held to it
	@compose/setup.sh venv
	GATEWAY__EVENTS__DURATION_MAX=100ms API_SEED=$(API_SEED) \
		$(target)/local run $(ports) -- loadtest/api-test.sh

release: ## What is shipped: services optimised for what they were seen to do, in target/shipped
	compose/release.sh

bench: release ## Speed against baselines in the same run, as a table and target/bench/report.json
	SQLX_OFFLINE=true cargo build --locked --release --package loadtest --bin bench
	install target/release/bench target/shipped/bench
	target/shipped/bench --pairs $(PAIRS) --project-events $(PROJECT_EVENTS) \
		--rebuild-events $(EVENTS) $(if $(ONLY),--only $(ONLY)) $(if $(CHECK),--check)

prepare: setup ## Check the SQL statements against a database and write .sqlx
	cargo build --locked --package compose --bin local
	rm -rf .sqlx && mkdir .sqlx
	find . -name '*.rs' -not -path './target/*' | xargs grep -l 'query' | xargs touch
	SQLX_OFFLINE=false SQLX_OFFLINE_DIR=$(CURDIR)/.sqlx \
		target/debug/local with-database cargo check --workspace --all-targets --locked

render: setup ## Write the configurations for Docker
	cargo run --locked --package compose --bin local -- render

setup: ## Install what is missing
	@compose/setup.sh

binaries: setup
	SQLX_OFFLINE=true cargo build --workspace --bins --locked --profile $(PROFILE)
