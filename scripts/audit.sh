#!/usr/bin/env bash
# Checks what the library depends on: licences and sources (deny.toml), and known vulnerabilities, as far as the list
# of them can be had.
#
#   scripts/audit.sh
#
# Licences and sources need nothing but the lock file. The list of vulnerabilities is fetched; where that fails, this
# says that it was not checked and goes on, since a machine without that network could land nothing else. Fails if
# something is found.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

not_checked() {
  echo "${0##*/}: NOT CHECKED: $*"
}

if ! cargo deny --version >/dev/null 2>&1; then
  not_checked "licences, sources and vulnerabilities: cargo-deny is not installed (scripts/install-test-tools.sh does that)"
  exit 0
fi
cargo deny --locked check licenses bans sources

# No terminal, no question: a machine that needs a password for the network counts as one without.
if said=$(GIT_TERMINAL_PROMPT=0 timeout 60 cargo deny --locked fetch db 2>&1); then
  cargo deny --locked --offline check advisories
else
  not_checked "known vulnerabilities: the list of them could not be fetched: $(tail -n 1 <<<"$said")"
fi
