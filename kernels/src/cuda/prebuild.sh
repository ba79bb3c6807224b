#!/usr/bin/env bash
# Compiles the kernels with nvcc and writes what the build embeds: prebuilt/*.fatbin, units.rs, sources.sha256, and
# docs/cuda-kernels.md, what ptxas says of each kernel.
#   prebuild.sh           writes them
#   prebuild.sh --check   compiles to a temporary folder and compares
# The output depends on nvcc's version alone, so it is the one from pip, kept in $CUPOLA_NVCC_VENV (default: .cuda-venv here).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=${CUPOLA_NVCC_VENV:-$root/.cuda-venv}

if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv"; fi
nvcc=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
if [ ! -x "$nvcc" ]; then
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/nvcc-requirements.txt"
  nvcc=$(echo "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
fi

out=$here/prebuilt report=$root/docs/cuda-kernels.md
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d) report=$out/cuda-kernels.md
  trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out"
cd "$here/cu" # nvcc sees the same paths wherever the repository lies

compile() { # UNIT
  "$nvcc" -std=c++17 -O3 -fatbin --compress-mode=size -Xptxas -v -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
    -gencode arch=compute_80,code=compute_80 "$1.cu" -o "$out/$1.fatbin" 2>"$out/$1.log" || { cat "$out/$1.log" >&2; return 1; }
}

rows() { # UNIT: one line of the table per kernel and architecture, from ptxas' report
  awk -v unit="$1" '
    /Compiling entry function/ { split($0, quoted, "\x27"); kernel = quoted[2]; arch = quoted[4] }
    /bytes stack frame/ { stack = $1; spills = $5 + $9 }
    /Used [0-9]+ registers/ {
      shared = 0; for (i = 2; i <= NF; i++) if ($i ~ /^smem/) shared = $(i - 2)
      printf "| %s | `%s` | %s | %d | %d | %d | %d |\n", unit, kernel, arch, $5, stack, spills, shared
    }' "$out/$1.log"
}

rm -f "$out"/*.fatbin
for source in *.cu; do compile "${source%.cu}"; done
{
  echo "&["
  for source in *.cu; do echo "    (\"${source%.cu}\", include_bytes!(\"${source%.cu}.fatbin\")),"; done
  echo "]"
} >"$out/units.rs"
sha256sum -- *.cu *.cuh >"$out/sources.sha256"
{
  echo "# What ptxas says of the CUDA kernels"
  echo
  echo "Written by \`kernels/src/cuda/prebuild.sh\` with $("$nvcc" --version | sed -n 's/^Cuda compilation tools, //p')."
  echo "Stack, spills and static shared memory are in bytes; dynamic shared memory is chosen at launch."
  echo "All of them pass their tests on an emulated driver, which proves what \`kernels/cuda-emulator/README.md\` says; no GPU has run them yet."
  echo
  echo "| unit | kernel | architecture | registers | stack | spills | shared |"
  echo "|---|---|---|---:|---:|---:|---:|"
  for source in *.cu; do rows "${source%.cu}"; done
} >"$report"
rm -f "$out"/*.log
if spilled=$(awk -F'|' 'NR > 8 && $7 > 0' "$report") && [ -n "$spilled" ]; then
  printf 'registers are spilled by\n%s\n' "$spilled" >&2
fi

if [ "${1:-}" = --check ]; then
  cmp "$report" "$root/docs/cuda-kernels.md"
  rm "$report"
  diff -r "$out" "$here/prebuilt"
  echo "the committed kernels are what these sources compile to"
fi
