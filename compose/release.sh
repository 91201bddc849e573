#!/usr/bin/env bash
# Builds what is shipped, into target/shipped. The services are built twice: first so that they count what they do, then
# for what they were counted to do while the bench had them at work (profile-guided optimisation). From nothing that takes
# two cores half an hour. Needs what compose/setup.sh and rustup install.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CARGO_INCREMENTAL=0 SQLX_OFFLINE=true
readonly target=$PWD/target
readonly counted=$target/counted
readonly shipped=$target/shipped
readonly services=(gateway region-projector)
# Every way of a request that a goal is set for, but for those that only wait.
readonly rows=fresh_read_cached,fresh_read_db,fresh_read_gathered,proxy_pass,append_http,append_latency,wait_wake,rebuild

host=$(rustc --version --verbose | sed -n 's/^host: //p')
readonly host

say() { printf 'release: %s\n' "$*"; }
fail() {
  printf 'release: %s\n' "$*" >&2
  exit 1
}

profdata() {
  local tool
  tool=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
  [ -x "$tool" ] || rustup component add llvm-tools >&2 || fail "needs the component llvm-tools of this toolchain"
  "$tool" "$@"
}

# build <flags> <folder>: a target is named so that build scripts and macros are left as they are.
build() {
  RUSTFLAGS=$1 cargo build --locked --release --bins --target "$host" \
    "${services[@]/#/--package=}"
  mkdir -p "$2"
  for service in "${services[@]}"; do
    install "$target/$host/release/$service" "$2/$service"
  done
}

compose/setup.sh nginx

say "building services that count"
build -Cprofile-generate "$counted"

# Named after what counted, so that a build of something else is a build for something else.
profile=$counted/$(cat "${services[@]/#/$counted/}" | sha256sum | cut -c-16).profdata
if [ ! -f "$profile" ]; then
  say "having them work"
  cargo build --locked --package loadtest --bin bench
  install "$target/debug/bench" "$counted/bench"
  rm -rf "$counted/raw"
  LLVM_PROFILE_FILE=$counted/raw/%m.profraw "$counted/bench" --pairs 1 --only "$rows" \
    --rebuild-events 50000 --report "$counted/report.json"
  profdata merge --output "$profile.new" "$counted"/raw/*.profraw
  mv "$profile.new" "$profile"
fi

say "building what is shipped"
build "-Cprofile-use=$profile" "$shipped"
say "built $shipped/{gateway,region-projector}"
