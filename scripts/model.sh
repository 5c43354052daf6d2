#!/usr/bin/env bash
# Runs the library's threads under a model checker, which explores orders that a test on a real machine meets once in
# a year.
#
#   scripts/model.sh [--seconds N] [SCENARIO]
#   scripts/model.sh --replay SCHEDULE SCENARIO
#
# Each scenario, or those whose name contains SCENARIO, is run for N seconds (default 4) under as many schedules as
# that makes. The schedule of a failure is kept in target/model/failures until the next run; --replay runs it once
# more, with a backtrace, as long as the code is the one that it was found with. Needs no database. See src/model/.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

usage() {
  echo "usage: ${0##*/} [--seconds N] [SCENARIO] | --replay SCHEDULE SCENARIO" >&2
  exit 2
}
seconds=4
while [[ ${1-} == -* ]]; do
  case $1 in
    --seconds) seconds=${2:?$(usage)} ;;
    --replay)
      STORAGE_LOCK_MODEL_REPLAY=$(realpath "${2:?$(usage)}")
      export STORAGE_LOCK_MODEL_REPLAY RUST_BACKTRACE=1
      ;;
    *) usage ;;
  esac
  shift 2
done

export STORAGE_LOCK_MODEL_SECONDS=$seconds
export STORAGE_LOCK_MODEL_FAILURES=$PWD/target/model/failures
if [ -z "${STORAGE_LOCK_MODEL_REPLAY-}" ]; then
  rm -rf "$STORAGE_LOCK_MODEL_FAILURES"
fi
mkdir -p "$STORAGE_LOCK_MODEL_FAILURES"

# A build of its own, with its own flags, beside the ordinary one. Only what runs a million times is optimised.
export RUSTFLAGS="${RUSTFLAGS-} --cfg shuttle"
optimised=(--config 'profile.test.opt-level=2' --config 'profile.test.package."*".opt-level=0')
for package in shuttle-engine shuttle-schedulers shuttle-std; do
  optimised+=(--config "profile.test.package.$package.opt-level=2")
done
exec cargo test --locked --lib --target-dir target/model "${optimised[@]}" -- "model::scenarios::${1-}"
