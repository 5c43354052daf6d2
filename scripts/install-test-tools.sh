#!/usr/bin/env bash
# Installs what the tests use beyond PostgreSQL itself: pgbouncer, to be tested behind it, libfaketime, to move wall
# clocks, shellcheck, for these scripts, and cargo-deny, for scripts/audit.sh. Debian's packages, as root or with
# sudo, and cargo's; does nothing where they are there already.
set -euo pipefail

if ! cargo deny --version >/dev/null 2>&1; then
  # It runs for a second: unoptimised it is built in half the time, a minute on two cores.
  CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --no-default-features --version '^0.20' cargo-deny
fi

missing=()
for tool in pgbouncer shellcheck; do
  if ! command -v "$tool" >/dev/null && [ ! -x "/usr/sbin/$tool" ]; then
    missing+=("$tool")
  fi
done
if ! compgen -G '/usr/lib/*/faketime/libfaketimeMT.so.1' >/dev/null; then
  missing+=(libfaketime)
fi
if [ "${#missing[@]}" -eq 0 ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "${0##*/}: please install: ${missing[*]}" >&2
  exit 1
fi
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  sudo=(sudo -n)
fi
"${sudo[@]}" apt-get -qq update
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=120 install "${missing[@]}"
