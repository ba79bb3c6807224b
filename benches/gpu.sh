#!/usr/bin/env bash
# One run on a machine with a GPU: are the kernels right, and how fast are they? Builds nothing, takes under 10 minutes.
#   benches/gpu.sh CUPOLA TESTS [OUT]
# CUPOLA is the release binary; TESTS the unit-test binary of the kernels crate, of the same sources, that
# `cargo test --release --no-run -p cupola-kernels --lib` names. Both can be made on another machine of the same kind of Linux.
# Weights are random (`--load-format dummy`), so none are fetched. OUT (default: gpu-result) receives every log; what is
# printed last is the result.
#   CUPOLA_GPU_MODELS  the shapes to measure (default: "llama-3.2-1b llama-3.1-8b"; folders with a config.json will do)
set -uo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
fi
cupola=$(realpath "$1") tests=$(realpath "$2") out=${3:-gpu-result}
read -r -a models <<<"${CUPOLA_GPU_MODELS:-llama-3.2-1b llama-3.1-8b}"
export CUPOLA_LOG=warn
mkdir -p "$out"
: >"$out/result.txt"
failed=0
say() { printf '%s\n' "$*" | tee -a "$out/result.txt"; }
# step NAME SECONDS COMMAND...: runs it within its time, keeps what it says in OUT/NAME.log
step() {
  local name=$1 limit=$2
  shift 2
  printf '=== %4ds  %s\n' "$SECONDS" "$name" >&2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then return 0; fi
  failed=1
  say "FAILED: $name (see $out/$name.log); its last lines:"
  tail -n 8 "$out/$name.log" | sed 's/^/    /' | tee -a "$out/result.txt"
  return 1
}

say "# $(date -u +%Y-%m-%dT%H:%MZ), $("$cupola" --version)"
if command -v nvidia-smi >/dev/null; then
  say "# $(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv,noheader | head -1)"
fi

# 1. Parity: every op on the device against the scalar reference, drawing tokens and 8-bit keys and values among them, and a whole tiny model. Then the
# speed of kernels, the last table of which is that of drawing tokens.
if step parity 150 "$tests" cuda::tests --test-threads=1 --nocapture; then
  say "parity: $(grep -ho 'cuda tests run on .*' "$out/parity.log" | head -1); $(grep -h '^test result' "$out/parity.log" | tail -1)"
fi
step bandwidth 30 "$tests" cuda::driver::tests::copy_bandwidth --ignored --nocapture && say "$(grep -h '^copy bandwidth' "$out/bandwidth.log")"

step kernels 90 "$tests" cuda::tests::speed --ignored --nocapture --test-threads=1 && say "" && say "## kernels" &&
  say "$(grep -hvE '^(running|test |cuda tests|$)' "$out/kernels.log")"
if step kernels-own 60 env CUPOLA_CUBLASLT=off "$tests" cuda::tests::speed::products --ignored --nocapture; then
  say "" && say "products by kernels of our own alone, from 512 rows:"
  say "$(grep -hE '^matrix products| (512|2048) ' "$out/kernels-own.log")"
fi

# 2. The decoder alone, with decoding steps recorded as graphs and without, and prefill with cuBLASLt (where it is found: the
# column of the backend says so) and without. `bandwidth` is what a step reads, per second, as a share of what the device copies.
for model in "${models[@]}"; do
  name=kernel-$(basename "$model")
  if step "$name" 110 "$cupola" bench kernel -m "$model" --load-format dummy --device cuda -p 512,2048 -n 64 -b 1,8,32 --chunk 2048 -r 3; then
    say "" && say "## decoder, $(basename "$model"), random bf16 weights" && say "$(grep -h '|' "$out/$name.log")"
  fi
  if step "$name-eager" 80 "$cupola" bench kernel -m "$model" --load-format dummy --device cuda --enforce-eager -p 0 -n 64 -b 1,8,32 -r 3; then
    say "" && say "without graphs:" && say "$(grep -h '|' "$out/$name-eager.log")"
  fi
  if step "$name-own" 80 env CUPOLA_CUBLASLT=off "$cupola" bench kernel -m "$model" --load-format dummy --device cuda -p 512,2048 -n 0 --chunk 2048 -r 3; then
    say "" && say "prefill by kernels of our own alone:" && say "$(grep -h '|' "$out/$name-own.log")"
  fi
done

# Long context, where keys and values are much of what a step reads: in 16 bits and in 8.
say "" && say "## decoder behind 8192 tokens, $(basename "${models[0]}")"
for kv in auto fp8; do
  if step "context-$kv" 45 "$cupola" bench kernel -m "${models[0]}" --load-format dummy --device cuda --kv-cache-dtype "$kv" -p 0 -n 32 -d 8192 -b 1,8 --chunk 2048 -r 2; then
    say "" && say "--kv-cache-dtype $kv:" && say "$(grep -h '|' "$out/context-$kv.log")"
  fi
done

# 3. Served, at rising concurrency; then with steps that wait until the host has read the tokens before them.
serve() { # MODEL CONCURRENCIES ARGS...
  local model=$1 concurrencies=$2 name url server
  shift 2
  name=serve-$(basename "$model")${*// /}
  printf '=== %4ds  %s\n' "$SECONDS" "$name" >&2
  "$cupola" serve "$model" --load-format dummy --device cuda --port 0 --max-model-len 4096 --served-model-name bench \
    --max-num-batched-tokens 2048 "$@" >"$out/$name.url" 2>"$out/$name.server.log" &
  server=$!
  for _ in $(seq 600); do
    url=$(sed -n 's/^listening on //p' "$out/$name.url")
    [ -n "$url" ] && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
  done
  if [ -z "$url" ]; then
    failed=1
    say "FAILED: $name did not start; its last lines:"
    tail -n 8 "$out/$name.server.log" | sed 's/^/    /' | tee -a "$out/result.txt"
    kill "$server" 2>/dev/null
    return
  fi
  say "" && say "## served, $(basename "$model"), 128 in 128 out, temperature 0 $*" && say "| concurrency | output tok/s |" && say "|---:|---:|"
  for concurrency in $concurrencies; do
    if step "$name-$concurrency" 60 "$cupola" bench serve --base-url "$url" --max-concurrency "$concurrency" \
      --num-prompts $((concurrency * 3)) --random-input-len 128 --random-output-len 128 --ignore-eos --temperature 0 --json; then
      say "| $concurrency | $(sed -n 's/.*"output_throughput": *\([0-9.]*\).*/\1/p' "$out/$name-$concurrency.log" | head -1) |"
    fi
  done
  kill "$server" 2>/dev/null
  wait "$server" 2>/dev/null
}
serve "${models[0]}" "1 8 32 64"
serve "${models[0]}" "1 32" --no-async-scheduling

printf '\n=== %4ds  result (%s/result.txt)\n\n' "$SECONDS" "$out" >&2
cat "$out/result.txt"
exit "$failed"
