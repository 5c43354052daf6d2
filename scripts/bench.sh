#!/usr/bin/env bash
# Measures the library side by side with the bare statements that it sends, so that "fast enough" is a figure.
#
#   scripts/bench.sh [--short] [b1 … b10]
#
# Runs the benchmarks that are named, or all, which takes about seven minutes, against a throwaway server, a durable
# one with pg_stat_statements, or against the one in STORAGE_LOCK_POSTGRESQL_DSN. Tables go to the standard output,
# CSV and SVG files to target/bench. --short runs each for a moment, to see that it works; its figures say nothing.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

# What TLS costs is measured where the library can be built with it, and the server can have a certificate.
tls=() features=()
if pkg-config --exists openssl 2>/dev/null && command -v openssl >/dev/null; then
  tls=(--tls)
  features=(--features tls)
fi
exec scripts/with-postgres.sh ${tls[@]+"${tls[@]}"} -c shared_preload_libraries=pg_stat_statements \
  cargo bench --locked ${features[@]+"${features[@]}"} --bench locks -- --out target/bench "$@"
