#!/usr/bin/env bash
# The README's first command, as a user types it: builds the release binary, serves the default model, asks it a
# question with curl, and stops it with SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp -d)
cargo run --release -- serve --port 0 >"$log/stdout" 2>"$log/stderr" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
for _ in $(seq 1800); do
  url=$(sed -n 's/^listening on //p' "$log/stdout")
  [ -n "$url" ] && break
  kill -0 "$server" 2>/dev/null || { cat "$log/stderr"; exit 1; }
  sleep 1
done
answer=$(curl -sSf "$url/v1/chat/completions" -H 'content-type: application/json' -d '{
  "model": "smollm2-135m-instruct", "temperature": 0, "max_tokens": 16,
  "messages": [{"role": "system", "content": "You are a helpful assistant."},
               {"role": "user", "content": "The capital of France is"}]}')
echo "$answer"
case "$answer" in *Paris*) ;; *) echo "expected Paris in the answer"; exit 1 ;; esac
# cargo does not pass signals on: the server is its child.
kill -TERM "$(pgrep -P "$server")"
wait "$server" || { echo "the server did not stop cleanly"; exit 1; }
trap - EXIT
echo "smoke test passed"
