#!/usr/bin/env bash
# Hurts real clients and a real server in every way that we know, and judges what the clients saw: see tests/robustness.
#
#   scripts/robustness.sh [--tls] [--minutes N] [--seed S] [--seeds N]
#
# Without options it runs the twenty seeds that the tests run. --seed S runs one seed again, or begins with it where
# --minutes or --seeds is given too; --minutes N goes on with further seeds for so long. With --tls all connections of
# the library's use TLS. Needs PostgreSQL's binaries, as scripts/with-postgres.sh does; it starts servers of its own.
# With libfaketime (scripts/install-test-tools.sh) the workers' wall clocks are moved too. The histories of a run that
# breaks a rule stay in target/tmp/robustness.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

usage() {
  echo "usage: ${0##*/} [--tls] [--minutes N] [--seed S] [--seeds N]" >&2
  exit 2
}
seed='' seeds='' minutes='' features=()
if [ "${1-}" = --tls ]; then
  export STORAGE_LOCK_ROBUSTNESS_TLS=yes
  features=(--features tls)
  shift
fi
while [ $# -gt 0 ]; do
  [[ ${2-} =~ ^[0-9]+$ ]] || usage
  case $1 in
    --minutes) minutes=$2 ;;
    --seed) seed=$2 ;;
    --seeds) seeds=$2 ;;
    *) usage ;;
  esac
  shift 2
done
if [ -n "$seed" ] && [ -z "$minutes$seeds" ]; then
  seeds=1
fi
for name in seed seeds minutes; do
  if [ -n "${!name}" ]; then
    export "STORAGE_LOCK_ROBUSTNESS_${name^^}=${!name}"
  fi
done
exec cargo test --locked ${features[@]+"${features[@]}"} --test robustness whatever_is_hurt -- --nocapture
