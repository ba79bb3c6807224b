#!/usr/bin/env bash
# Runs the CPU kernels' tests with AVX-512 VNNI on an emulated Ice Lake and with AVX-VNNI on an emulated Arrow Lake. See
# README.md beside this.
# `x86.sh [ice-lake|arrow-lake ARGUMENTS...]`: what to hand to the test program there; without any, what CI runs on both.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=x86_64-unknown-linux-gnu
work=$(realpath -m "${CARGO_TARGET_DIR:-target}")/isa-x86

# Of this version and no other: shim.c relies on what is inside it.
if ! [ -x "$work/venv/bin/python" ] || ! "$work/venv/bin/pip" --version >/dev/null; then
  python3 -m venv --clear "$work/venv"
fi
if ! "$work/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: bochscpu-python==0.4.0; then
  printf '\n!!! NOT TESTED: the kernels for AVX-512 and AVX-VNNI. There is no emulator for this system and its Python.\n\n'
  # CI says that everything must be there.
  [ "${CUPOLA_TEST_REQUIRE:-}" != all ]
  exit
fi
gcc -shared -fPIC -O1 -Wall -Werror -o "$work/shim.so" tests/isa/x86/shim.c
gcc -c -o "$work/entry.o" tests/isa/x86/entry.S
objcopy -O binary -j .text "$work/entry.o" "$work/entry.bin"

# In one piece and at fixed addresses: the emulated system has no loader of libraries. Optimised: an emulator that does some
# forty million instructions a second has no time for the others.
export RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
build=(cargo test --release -p cupola-kernels --lib --target $target --no-run)
"${build[@]}"
# The same command again only says where the program is.
program=$("${build[@]}" --message-format=json 2>/dev/null | grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d'"' -f4)

# run CPU ARGUMENTS...
run() {
  CUPOLA_EMULATED_CPU=$1 timeout 1200 "$work/venv/bin/python" tests/isa/x86/linux.py "$work/shim.so" "$work/entry.bin" \
    "$program" --test-threads=1 "${@:2}"
}
if [ $# -gt 0 ]; then
  run "$@"
  exit
fi

# covers CPU TEST SETS: the test passes, and ran with these sets.
covers() {
  run "$1" --exact "$2" --nocapture | tee "$work/output"
  grep -qF "instruction sets covered: [$3]" "$work/output"
}

sums=cpu::gemm::tests::integer_sums_are_the_same_everywhere
covers ice-lake $sums 'Scalar, Avx2, Avx512'
covers arrow-lake $sums 'Scalar, Avx2, AvxVnni'
run ice-lake cpu::isa cpu::simd cpu::act cpu::norm cpu::gemm::tests::integer_sums cpu::gemm::tests::zero
run arrow-lake cpu::isa cpu::gemm::tests::integer_sums cpu::gemm::tests::zero
# The longer ones with the set in question alone: the other sets run where the other tests do.
every=cpu::gemm::tests::every_type_and_tile_agrees_with_the_definition
CUPOLA_TEST_ISA=avxvnni covers arrow-lake $every AvxVnni
export CUPOLA_TEST_ISA=avx512
covers ice-lake $every Avx512
covers ice-lake cpu::rope::tests::rows_turn_and_land_where_they_belong Avx512
run ice-lake cpu::rope --skip angles_far_into_a_text
