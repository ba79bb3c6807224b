#!/usr/bin/env bash
# The README's commands, as a user types them: builds the release binary, serves the default model, sends the printed
# curl line and a question with a known answer, asks the same through `run`, and stops the server with SIGTERM.
# Every step has a time limit and prints how long it took. Needs Rust, Python 3, and pip where there is no model hub.
set -euo pipefail
cd "$(dirname "$0")/.."
build_limit=${SMOKE_BUILD_LIMIT:-2700} start_limit=${SMOKE_START_LIMIT:-600} answer_limit=60 stop_limit=40

began=$SECONDS
step() { printf -- '--- %s (%ds)\n' "$1" "$((SECONDS - began))"; began=$SECONDS; }
fail() { echo "smoke test failed: $1" >&2; tail -n 20 "$log"/* >&2 2>/dev/null || true; exit 1; }

log=$(mktemp -d)
server=
# `cargo run` becomes the program on Unix, but a wrapper around cargo may stay above it.
pids() { [ -z "$server" ] || { cat "/proc/$server/task/"*/children 2>/dev/null || true; echo "$server"; }; }
stop() { for pid in $(pids); do kill -KILL "$pid" 2>/dev/null || true; done; rm -rf "$log"; }
trap stop EXIT

timeout "$build_limit" cargo build --release || fail "the release build did not end well within $build_limit s"
step "cargo build --release"

cargo run --release -- serve --port 0 >"$log/stdout" 2>"$log/stderr" &
server=$!
url=
until [ -n "$url" ]; do
  kill -0 "$server" 2>/dev/null || fail "the server ended before it listened"
  [ "$((SECONDS - began))" -lt "$start_limit" ] || fail "the server did not listen within $start_limit s"
  sleep 0.2
  url=$(sed -n 's/^listening on //p' "$log/stdout")
done
step "cargo run --release -- serve: listening on $url"

line=$(sed -n 's/^try: //p' "$log/stderr")
[ -n "$line" ] || fail "serve printed no curl line"
if command -v curl >/dev/null; then
  answer=$(timeout "$answer_limit" bash -c "$line" 2>/dev/null) || fail "this line does not work: $line"
  case "$answer" in *'"finish_reason"'*) ;; *) fail "the curl line was answered by: $answer" ;; esac
  step "the printed curl line"
fi

answer=$(python3 - "$url" "$answer_limit" <<'PYTHON'
import json, sys, urllib.request
body = {"model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": 16, "messages": [
    {"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "The capital of France is"}]}
request = urllib.request.Request(sys.argv[1] + "/v1/chat/completions", json.dumps(body).encode(),
                                 {"content-type": "application/json"})
with urllib.request.urlopen(request, timeout=float(sys.argv[2])) as reply:
    print(json.load(reply)["choices"][0]["message"]["content"])
PYTHON
) || fail "the server did not answer"
case "$answer" in *Paris*) ;; *) fail "expected Paris, the server answered: $answer" ;; esac
step "POST /v1/chat/completions: $answer"

answer=$(timeout "$answer_limit" cargo run --release --quiet -- run smollm2-135m-instruct "The capital of France is" \
  --system "You are a helpful assistant." --temperature 0 --max-tokens 16 2>"$log/run") || fail "run ended with status $?"
case "$answer" in *Paris*) ;; *) fail "expected Paris, run answered: $answer" ;; esac
step "cargo run --release -- run: $answer"

# The last descendant is the program itself.
kill -TERM "$(pids | tr ' ' '\n' | sed '/^$/d' | head -n 1)"
sleep "$stop_limit" &
timer=$!
status=0
wait -n -p ended "$server" "$timer" || status=$?
[ "$ended" = "$server" ] || fail "the server did not stop within $stop_limit s of SIGTERM"
kill "$timer"
server=
[ "$status" -eq 0 ] || fail "after SIGTERM the server ended with status $status"
step "SIGTERM: ended with status 0"
echo "smoke test passed in $SECONDS s"
