#!/usr/bin/env bash
# Runs the CPU kernels' tests with AVX-512 VNNI on an emulated Ice Lake. See README.md beside this.
# `avx512.sh [ARGUMENTS...]`: what to hand to the test program; without any, what CI runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=x86_64-unknown-linux-gnu
work=$(realpath -m "${CARGO_TARGET_DIR:-target}")/isa-avx512

# Of this version and no other: shim.c relies on what is inside it.
if ! [ -x "$work/venv/bin/python" ] || ! "$work/venv/bin/pip" --version >/dev/null; then
  python3 -m venv --clear "$work/venv"
fi
if ! "$work/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: bochscpu-python==0.4.0; then
  printf '\n!!! NOT TESTED: the AVX-512 kernels. There is no emulator for this system and its Python.\n\n'
  # CI says that everything must be there.
  [ "${CUPOLA_TEST_REQUIRE:-}" != all ]
  exit
fi
gcc -shared -fPIC -O1 -Wall -Werror -o "$work/shim.so" tests/isa/avx512/shim.c
gcc -c -o "$work/entry.o" tests/isa/avx512/entry.S
objcopy -O binary -j .text "$work/entry.o" "$work/entry.bin"

# In one piece and at fixed addresses: the emulated system has no loader of libraries. Optimised: an emulator that does some
# forty million instructions a second has no time for the others.
export RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static"
build=(cargo test --release -p cupola-kernels --lib --target $target --no-run)
"${build[@]}"
# The same command again only says where the program is.
program=$("${build[@]}" --message-format=json 2>/dev/null | grep -o '"executable":"[^"]*"' | tail -n 1 | cut -d'"' -f4)

run() {
  timeout 1200 "$work/venv/bin/python" tests/isa/avx512/linux.py "$work/shim.so" "$work/entry.bin" "$program" \
    --test-threads=1 "$@"
}
if [ $# -gt 0 ]; then
  run "$@"
  exit
fi

# covers TEST SETS: the test passes, and ran with these sets.
covers() {
  run --exact "$1" --nocapture | tee "$work/output"
  grep -qF "instruction sets covered: [$2]" "$work/output"
}

covers cpu::gemm::tests::integer_sums_are_the_same_everywhere 'Scalar, Avx2, Avx512'
run cpu::isa cpu::simd cpu::act cpu::norm cpu::gemm::tests::integer_sums cpu::gemm::tests::zero
# The longer ones with AVX-512 alone: the other sets run where the other tests do.
export CUPOLA_TEST_ISA=avx512
covers cpu::rope::tests::rows_turn_and_land_where_they_belong Avx512
run cpu::rope --skip angles_far_into_a_text
