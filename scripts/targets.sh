#!/usr/bin/env bash
# Checks that the library, not its tests, compiles for other systems: Windows, 32 bits, and 32 bits without 64-bit
# atomics. A target that isn't installed, and that rustup can't get, is named and left out.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."

targets=(x86_64-pc-windows-gnu i686-unknown-linux-gnu powerpc-unknown-linux-gnu)

for target in "${targets[@]}"; do
  if ! [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] && ! rustup --quiet target add "$target" 2>/dev/null; then
    echo "$target: not checked, because it can't be installed here"
    continue
  fi
  RUSTFLAGS="${RUSTFLAGS-} -D warnings" cargo check --quiet --locked --lib --target "$target" --target-dir target/targets
  echo "$target: the library compiles"
done
