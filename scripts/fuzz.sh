#!/usr/bin/env bash
# Looks for a DSN, an id or a name that the code mishandles, led by the branches that each input takes: what the
# property tests of src/fuzz.rs check at random, for as long as one likes.
#
#   scripts/fuzz.sh [SECONDS]
#
# Runs each target for so long (default 60) and fails if one finds something; the input is then in fuzz/artifacts.
# Needs `cargo fuzz` (cargo install cargo-fuzz) and a C++ compiler; where cargo-fuzz is missing, it says so and does
# nothing.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

readonly seconds=${1-60}
if ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: ${0##*/} [SECONDS]" >&2
  exit 2
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
  echo "${0##*/}: NOT RUN: cargo-fuzz is not installed (cargo install cargo-fuzz)"
  exit 0
fi

# The coverage and the sanitizer are unstable options of the compiler; any toolchain has them, if it is told that this
# is known.
export RUSTC_BOOTSTRAP=1
for target in dsn name; do
  mkdir -p "fuzz/corpus/$target"
  cargo fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
    -max_total_time="$seconds" -max_len=400 -dict=fuzz/dsn.dict -print_final_stats=1
done
