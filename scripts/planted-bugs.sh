#!/usr/bin/env bash
# Breaks the lock on purpose, in each of the ways of tests/robustness/planted, and shows that the tests find it: a test
# that finds nothing proves something only if it would have found what is there.
#
#   scripts/planted-bugs.sh [--record] [NAME…]          random runs, until one breaks a rule
#   scripts/planted-bugs.sh --sure [--times N] [NAME…]  only the tests that find it every time
#   scripts/planted-bugs.sh --check [NAME…]             every patch applies, and the README's table is up to date
#   scripts/planted-bugs.sh --table                     writes that table
#
# A patch begins with lines that say what the bug is (`Bug:`), which tests find it every time (`Found by:`, as cargo and
# the test are told it, one a line), and which rules caught it in random runs (`Rules:`; or `none:` and why no run can).
# Without names all patches are meant.
#
# Each patch is applied to a copy of this tree in target/planted, which is built there. Without --sure the robustness
# tests run on it, sixty seeds at most; --record writes the rules and the number of runs into the patch and the table.
# It takes about a minute a bug, and fails if one is not caught. --sure takes a few minutes for all. It fails if a test
# passes that should find a bug (each of N times, default 1), or if one fails on the tree without bugs. It needs
# PostgreSQL's binaries, or STORAGE_LOCK_POSTGRESQL_DSN.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
readonly root name=${0##*/} seeds=60
readonly planted=$root/tests/robustness/planted work=$root/target/planted
readonly tree=$work/tree table=$planted/README.md
# How many bugs are looked for at once, while the next one is built. Most tests wait most of the time.
readonly at_once=3
# For a test that hangs.
readonly longest=120

usage() {
  sed -nE 's/^#   (scripts\/.*)/usage: \1/p' "$root/scripts/planted-bugs.sh" >&2
  exit 2
}

die() {
  echo "$name: $*" >&2
  exit 1
}

mode=random record='' times=1
while [[ ${1-} == -* ]]; do
  case $1 in
    --sure | --check | --table) mode=${1#--} ;;
    --record) record=yes ;;
    --times)
      [[ ${2-} =~ ^[1-9][0-9]*$ ]] || usage
      times=$2
      shift
      ;;
    *) usage ;;
  esac
  shift
done
names=("$@")
if [ "${#names[@]}" -eq 0 ]; then
  for patch in "$planted"/*.patch; do names+=("$(basename "$patch" .patch)"); done
fi
for bug in "${names[@]}"; do
  [ -f "$planted/$bug.patch" ] || die "there is no $planted/$bug.patch"
done

# What the lines of a patch say that begin with a word.
header() {
  sed -nE "/^diff /q; s/^$2: (.*)/\1/p" "$planted/$1.patch"
}

# The tree as it is, with what isn't committed. New times of all files, so that cargo sees what a patch before had
# changed.
copy_tree() {
  rm -rf "$work/tree"
  mkdir -p "$work/tree"
  git ls-files -z --cached --others --exclude-standard |
    tar --null --files-from=- --ignore-failed-read -cf - 2>/dev/null |
    tar -xmf - -C "$tree"
}

# plant NAME [OPTION…]
plant() {
  local bug=$1
  shift
  patch --quiet --fuzz=0 --strip=1 --directory="$tree" --no-backup-if-mismatch "$@" <"$planted/$bug.patch"
}

# In the copy, with the folder for what it builds that all bugs share. Nobody looks at it with a debugger.
cargo_test() {
  (
    cd "$tree"
    export CARGO_TARGET_DIR=$work/target CARGO_PROFILE_DEV_DEBUG=0 CARGO_INCREMENTAL=1
    cargo test --locked --quiet "$@"
  )
}

print_table() {
  local patch bug found
  echo '| patch | what is broken | what finds it every time | rules, in random runs |'
  echo '| --- | --- | --- | --- |'
  for patch in "$planted"/*.patch; do
    bug=$(basename "$patch" .patch)
    # shellcheck disable=SC2016 # These are backquotes of Markdown.
    found=$(header "$bug" 'Found by' | sed -e 's/.*/`&`/' | paste -sd, - | sed -e 's/,/, /g')
    echo "| \`$bug\` | $(header "$bug" Bug) | $found | $(header "$bug" Rules) |"
  done
}

# The text before the table, and the table.
print_readme() {
  sed '/^| patch /,$d' "$table"
  print_table
}

write_table() {
  local text
  text=$(print_readme)
  printf '%s\n' "$text" >"$table"
}

check() {
  local bug is_bad='' line
  copy_tree
  for bug in "${names[@]}"; do
    plant "$bug" --forward --dry-run || is_bad=yes
    for line in Bug 'Found by' Rules; do
      if [ -z "$(header "$bug" "$line")" ]; then
        is_bad=yes
        echo "$bug: there is no line $line:" >&2
      fi
    done
    while read -r line; do
      if ! [[ $line =~ ^--(lib|test\ [a-z]+)\ [a-z0-9_:]+$ ]]; then
        is_bad=yes
        echo "$bug: not a test: $line" >&2
      fi
    done < <(header "$bug" 'Found by')
  done
  if ! diff -u "$table" <(print_readme) >&2; then
    is_bad=yes
    echo "the table is out of date: run scripts/planted-bugs.sh --table" >&2
  fi
  [ -z "$is_bad" ]
}

# The kinds of test binaries that find some bugs, as `lib` or `it`.
kinds_of() {
  local bug
  for bug in "$@"; do header "$bug" 'Found by'; done | sed -E 's/^--(test )?([a-z]+) .*/\2/' | sort -u
}

# The tests of one kind that find some bugs.
finders_of() {
  local kind=$1 bug
  shift
  for bug in "$@"; do header "$bug" 'Found by'; done | sed -nE "s/^--(test )?$kind //p" | sort -u
}

# build BUG KIND…: builds what is in the copy, and keeps the binaries.
build() {
  local bug=$1 kind binary target
  shift
  for kind in "$@"; do
    target=(--test "$kind")
    [ "$kind" != lib ] || target=(--lib)
    binary=$(cargo_test "${target[@]}" --no-run --message-format=json-render-diagnostics 2>>"$work/sure/$bug.log" |
      sed -nE 's/.*"executable":"([^"]+)".*/\1/p')
    [ -x "$binary" ] || return 1
    cp "$binary" "$work/sure/$bug.$kind"
  done
}

# run_finders BUG KIND TEST…: what each of the tests says, as "ok TEST" or "FAILED TEST".
run_finders() {
  local bug=$1 kind=$2
  shift 2
  # In the copy, as cargo would.
  (cd "$tree" && timeout --kill-after=5 "$longest" "$work/sure/$bug.$kind" --exact "$@" 2>&1) |
    tee -a "$work/sure/$bug.log" | sed -nE 's/^test ([^ ]+) \.\.\. (ok|FAILED)$/\2 \1/p'
}

# Whether all tests say so, as often as they are asked; tells of those that don't. expect WHAT BUG NAMES…
expect() {
  local wanted=$1 bug=$2 kind tests said test round is_so=yes begin=$SECONDS
  shift 2
  local count=0
  for kind in $(kinds_of "$@"); do
    mapfile -t tests < <(finders_of "$kind" "$@")
    count=$((count + ${#tests[@]}))
    for ((round = 1; round <= (bug_is_planted ? times : 1); round++)); do
      # It fails where one of them does.
      said=$(run_finders "$bug" "$kind" "${tests[@]}") || true
      for test in "${tests[@]}"; do
        grep -qxF "$wanted $test" <<<"$said" && continue
        is_so=
        echo "  $bug: not $wanted: $test, see $work/sure/$bug.log"
      done
    done
    rm -f "$work/sure/$bug.$kind"
  done
  local result=found
  ((bug_is_planted)) || result=passed
  if [ -n "$is_so" ]; then
    touch "$work/sure/$bug.$result"
  else
    result="NOT $result"
  fi
  printf '%-42s %s: %d tests, built in %d s, run in %d s\n' "$bug" "$result" "$count" "$built" "$((SECONDS - begin))"
}

sure() {
  local bug kinds begin started=$SECONDS bug_is_planted=0 built
  rm -rf "$work/sure"
  mkdir -p "$work/sure"
  trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
  copy_tree
  mapfile -t kinds < <(kinds_of "${names[@]}")
  if ! build no-bug "${kinds[@]}"; then
    cat "$work/sure/no-bug.log" >&2
    die "the tree doesn't build"
  fi
  built=$((SECONDS - started))
  expect ok no-bug "${names[@]}" &
  bug_is_planted=1
  for bug in "${names[@]}"; do
    begin=$SECONDS
    plant "$bug" --forward >>"$work/sure/$bug.log" || die "$bug: the patch doesn't apply"
    mapfile -t kinds < <(kinds_of "$bug")
    if ! build "$bug" "${kinds[@]}"; then
      cat "$work/sure/$bug.log" >&2
      die "$bug: it doesn't build"
    fi
    plant "$bug" --reverse
    built=$((SECONDS - begin))
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n || true; done
    expect FAILED "$bug" "$bug" &
  done
  wait
  for bug in "${names[@]}"; do
    [ -f "$work/sure/$bug.found" ] || missed+=("$bug")
  done
  printf '%d bugs in %d s\n' "${#names[@]}" "$((SECONDS - started))"
  [ -f "$work/sure/no-bug.passed" ] || die "a test doesn't pass on the tree without bugs: see above"
}

random() {
  local bug log rules runs
  mkdir -p "$work"
  for bug in "${names[@]}"; do
    rules=$(header "$bug" Rules)
    if [[ $rules == none:* ]]; then
      printf '%-42s left out: %s\n' "$bug" "${rules#none: }"
      continue
    fi
    copy_tree
    plant "$bug" --forward
    log=$work/$bug.log
    if (
      cargo_test --test robustness --no-run
      export STORAGE_LOCK_ROBUSTNESS_SEEDS=$seeds STORAGE_LOCK_ROBUSTNESS_ENOUGH=1
      cargo_test --test robustness whatever_is_hurt -- --nocapture
    ) >"$log" 2>&1; then
      missed+=("$bug")
    fi
    rules=$(sed -nE 's/^ +broken rules: (.*)/\1/p' "$log" | head -n 1)
    runs=$(sed -nE 's/^([0-9]+) runs in.*/\1/p' "$log")
    if [ -n "$rules" ]; then
      printf '%-42s caught by rule %s in %s runs\n' "$bug" "$rules" "${runs:-?}"
      rules="$rules (${runs:-?} runs)"
    else
      printf '%-42s NOT CAUGHT in %s runs: see %s\n' "$bug" "${runs:-?}" "$log"
      [[ " ${missed[*]-} " == *" $bug "* ]] || missed+=("$bug")
      rules="none (${runs:-?} runs)"
    fi
    if [ -n "$record" ]; then
      sed -i -E "s/^Rules: .*/Rules: $rules/" "$planted/$bug.patch"
      write_table
    fi
  done
}

missed=()
case $mode in
  table) write_table ;;
  check) check ;;
  random) random ;;
  sure)
    if [ -z "${STORAGE_LOCK_POSTGRESQL_DSN-}" ]; then
      exec scripts/with-postgres.sh --fast scripts/planted-bugs.sh --sure --times "$times" "${names[@]}"
    fi
    sure
    ;;
esac
if [ "${#missed[@]}" -gt 0 ]; then
  die "not found: ${missed[*]}"
fi
