#!/usr/bin/env bash
# Measures the library side by side with the bare statements that it sends, so that "fast enough" is a figure.
#
#   scripts/bench.sh [--short] [b1 … b9]
#
# Runs the benchmarks that are named, or all, which takes about seven minutes, against a throwaway server, a durable
# one with pg_stat_statements, or against the one in STORAGE_LOCK_POSTGRESQL_DSN. Tables go to the standard output,
# CSV and SVG files to target/bench. --short runs each for a moment, to see that it works; its figures say nothing.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

exec scripts/with-postgres.sh -c shared_preload_libraries=pg_stat_statements \
  cargo bench --locked --bench locks -- --out target/bench "$@"
