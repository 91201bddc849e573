#!/usr/bin/env bash
# Makes requests from a region's /openapi.json, good ones and bad ones, and holds every answer to it: no 5xx, no
# status, type, header or body that is not described. Installs schemathesis, pinned, into a folder of the checkout.
#   URL_EU_WEST     public listener of the gateway
#   API_SEED        seed of the requests (default 1)
#   API_SECONDS     how long they are made (default 60)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly tools="${TIDEMARK_TOOLS:-$root/.tools}"
readonly pins="$root/loadtest/schemathesis.txt"
readonly venv="$tools/schemathesis"

fail() {
  printf 'api-test: %s\n' "$*" >&2
  exit 1
}

# The stamp holds the pins, so that a new one replaces what an old one installed.
if ! cmp -s "$pins" "$venv/.pins"; then
  printf 'api-test: installing schemathesis into %s\n' "$venv"
  rm -rf "$venv"
  python3 -m venv "$venv" || fail "python3 has no venv: install python3-venv"
  "$venv/bin/pip" --quiet --disable-pip-version-check install --no-deps --only-binary=:all: --requirement "$pins"
  cp "$pins" "$venv/.pins"
fi

readonly url="${URL_EU_WEST:?is set by \`local run\`}"
"$venv/bin/python" - "$url/openapi.json" <<'PYTHON'
import json, sys, urllib.request
from openapi_spec_validator import OpenAPIV31SpecValidator

with urllib.request.urlopen(sys.argv[1]) as answer:
    OpenAPIV31SpecValidator(json.load(answer)).validate()
print("api-test: the description is OpenAPI 3.1")
PYTHON

cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
"$venv/bin/schemathesis" run "$url/openapi.json" \
  --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance \
  --phases examples,coverage,fuzzing,stateful --max-time "${API_SECONDS:-60}" --max-examples 20 \
  --seed "${API_SEED:-1}" --request-timeout 20 --workers 1 --suppress-health-check all --warnings off
