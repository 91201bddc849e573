#!/usr/bin/env bash
# Builds what is shipped, into target/shipped. The services are built twice: first so that they count what they do, then
# for what they were counted to do while the bench had them at work (profile-guided optimisation). That took two cores 20
# minutes.
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
profdata=$(rustc --print sysroot)/lib/rustlib/$host/bin/llvm-profdata
readonly profdata

say() { printf 'release: %s\n' "$*"; }
fail() {
  printf 'release: %s\n' "$*" >&2
  exit 1
}

# build <flag> <folder>: a target is named so that build scripts and macros are left as they are.
build() {
  CARGO_ENCODED_RUSTFLAGS=$1 cargo build --locked --release --bins "${services[@]/#/--package=}" \
    --target "$host" --target-dir "$2/build"
  for service in "${services[@]}"; do
    install "$2/build/$host/release/$service" "$2/$service"
  done
}

compose/setup.sh nginx
[ -x "$profdata" ] || rustup component add llvm-tools ||
  fail "needs llvm-profdata of this toolchain, which is in rustup's component llvm-tools"

say "building services that count"
mkdir -p "$counted" "$shipped"
build -Cprofile-generate "$counted"
cargo build --locked --package loadtest --bin bench --target-dir "$target"
install target/debug/bench "$counted/bench"

# Named after who counted and what was done. Another one is for other code, which is built from nothing.
profile=$counted/$(cat compose/release.sh "$counted"/{bench,gateway,region-projector} | sha256sum | cut -c-16).profdata
if [ ! -f "$profile" ]; then
  say "having them work"
  rm -rf "$counted"/{raw,*.profdata} "$shipped/build"
  LLVM_PROFILE_FILE=$counted/raw/%m.profraw "$counted/bench" --pairs 1 --only "$rows" \
    --rebuild-events 50000 --report "$counted/report.json"
  "$profdata" merge --output "$counted/new" "$counted"/raw/*.profraw
  mv "$counted/new" "$profile"
fi

say "building what is shipped"
build "-Cprofile-use=$profile" "$shipped"
say "built target/shipped/{gateway,region-projector}"
