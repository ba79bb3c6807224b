#!/bin/sh
# Builds the emulated driver: OUT_DIR/libcuda.so.1, with every kernel of the source folder compiled in, and beside it the
# stand-in for cuBLASLt. Needs g++ on x86-64.
#   build.sh OUT_DIR [SOURCE_DIR]
# Each unit (*.cu) is wrapped in a namespace of its own, as nvcc compiles it on its own. Objects are kept and made again
# only when something they are made of is newer.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
kernels=$(cd "${2:-$here/../src/cuda/cu}" && pwd)
flags="-std=c++17 -O2 -g1 -fPIC -march=native -ffp-contract=fast -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter -Wno-comment"
flags="$flags -I$here -I$here/../src/cuda/cu -I$kernels"

# One build at a time: tests of several processes may ask for it together.
exec 9>"$out/lock"
flock 9

compile() { # OBJECT SOURCE
  if [ -f "$1" ] && [ -z "$(find "$here" "$here/../src/cuda/cu" "$kernels" -newer "$1" \( -name '*.hpp' -o -name '*.cuh' -o -name build.sh \))" ] &&
    [ ! "$2" -nt "$1" ]; then
    return
  fi
  case $2 in
  *.cu)
    unit=$(basename "$2" .cu)
    printf '#include "device.cuh"\nnamespace unit_%s {\n#include "%s"\n}\n' "$unit" "$2" | g++ $flags -x c++ -c - -o "$1"
    ;;
  *) g++ $flags -c "$2" -o "$1" ;;
  esac
  changed=1
}

changed=
objects=
for source in "$here"/*.cpp "$kernels"/*.cu; do
  [ -f "$source" ] || continue
  object=$out/$(basename "$source").o
  compile "$object" "$source"
  objects="$objects $object"
done
# The first name that a process looks for is libcuda.so: with this soname, a library that is loaded already is found by it.
if [ -n "$changed" ] || [ ! -f "$out/libcuda.so.1" ]; then
  g++ -shared -Wl,-soname,libcuda.so -Wl,-z,defs -o "$out/libcuda.so.1.new" $objects
  mv "$out/libcuda.so.1.new" "$out/libcuda.so.1"
fi
# Its driver is the one that is loaded already.
if [ -n "$changed" ] || [ ! -f "$out/libcublasLt.so.13" ] || [ "$here/cublaslt/cublaslt.cpp" -nt "$out/libcublasLt.so.13" ]; then
  g++ $flags -O3 -shared -Wl,-soname,libcublasLt.so.13 -Wl,-z,defs -o "$out/libcublasLt.so.13.new" "$here/cublaslt/cublaslt.cpp" "$out/libcuda.so.1"
  mv "$out/libcublasLt.so.13.new" "$out/libcublasLt.so.13"
fi
