#!/usr/bin/env bash
# Breaks the lock on purpose, in each of the ways of tests/robustness/planted, and shows that tests/robustness finds it: a test that
# finds nothing proves something only if it would have found what is there.
#
#   scripts/planted-bugs.sh [--check] [NAME…]
#
# For each patch (or those that are named) it copies this tree to target/planted, applies the patch, builds, and runs seeds until a
# run breaks a rule, at most sixty. Prints which rules caught which bug after how many runs, and fails if one was not
# caught. Takes about a minute a bug. --check only sees that every patch still applies.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly planted=tests/robustness/planted tree=target/planted/tree seeds=60

check=
if [ "${1-}" = --check ]; then
  check=yes
  shift
fi
names=("$@")
if [ "${#names[@]}" -eq 0 ]; then
  for patch in "$planted"/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi

# The tree as it is, with what isn't committed. New times of all files, so that cargo sees what a patch before had changed.
copy_tree() {
  rm -rf "$tree"
  mkdir -p "$tree"
  git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- --ignore-failed-read -cf - |
    tar -xmf - -C "$tree"
}

plant() {
  patch --quiet --strip=1 --directory="$tree" --forward --no-backup-if-mismatch <"$planted/$1.patch"
}

copy_tree
missed=()
for name in "${names[@]}"; do
  if [ -n "$check" ]; then
    patch --quiet --strip=1 --directory="$tree" --forward --dry-run <"$planted/$name.patch"
    continue
  fi
  copy_tree
  plant "$name"
  log=target/planted/$name.log
  (
    cd "$tree"
    export CARGO_TARGET_DIR=$OLDPWD/target/planted/target
    cargo test --quiet --locked --test robustness --no-run
    STORAGE_LOCK_ROBUSTNESS_SEEDS=$seeds STORAGE_LOCK_ROBUSTNESS_ENOUGH=1 \
      cargo test --quiet --locked --test robustness whatever_is_hurt -- --nocapture
  ) >"$log" 2>&1 && missed+=("$name")
  rules=$(sed -nE 's/^ +broken rules: (.*)/\1/p' "$log" | head -n 1)
  runs=$(sed -nE 's/^([0-9]+) runs in.*/\1/p' "$log")
  if [ -n "$rules" ]; then
    printf '%-40s caught by rule %s in %s runs\n' "$name" "$rules" "${runs:-?}"
  else
    printf '%-40s NOT CAUGHT in %s runs: see %s\n' "$name" "${runs:-?}" "$log"
    [[ " ${missed[*]-} " == *" $name "* ]] || missed+=("$name")
  fi
done
if [ "${#missed[@]}" -gt 0 ]; then
  echo "${0##*/}: not caught: ${missed[*]}" >&2
  exit 1
fi
