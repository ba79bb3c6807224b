#!/usr/bin/env bash
# Runs the CPU kernels' tests for 64-bit Arm under qemu: once on a CPU with the dot product, where NEON must be found, and
# once on one without, where the scalar kernels must be. See README.md beside this.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=aarch64-unknown-linux-gnu

if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-gcc >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null
fi
if ! [ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ] && ! rustup target add $target; then
  printf '\n!!! NOT TESTED: the NEON kernels. The Rust target %s is not installed and cannot be added.\n\n' $target
  exit 0
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
cargo test -p cupola-kernels --lib --target $target --no-run
# The same command again only says where the program is.
program=$(cargo test -p cupola-kernels --lib --target $target --no-run --message-format=json 2>/dev/null |
  grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d'"' -f4)

# run CPU ARGUMENTS...: the tests on that CPU. Left out: what measures the machine, and the benchmark's large shapes, whose
# kernels the tests of products run in every tile and type.
run() {
  local cpu=$1
  shift
  QEMU_LD_PREFIX=/usr/aarch64-linux-gnu qemu-aarch64 -cpu "$cpu" "$program" \
    --skip cuda:: --skip cpu::roofline --skip every_case_of_the_benchmark "$@"
}
# covers CPU SETS: the sets that the kernels find there.
covers() {
  run "$1" --exact cpu::gemm::tests::every_type_and_tile_agrees_with_the_definition --nocapture |
    grep -F "instruction sets covered: [$2]"
}

covers max,pauth-impdef=on 'Scalar, Neon'
run max,pauth-impdef=on
covers cortex-a72 'Scalar'
run cortex-a72 cpu::isa cpu::simd cpu::act cpu::norm
