#!/usr/bin/env python3
"""Runs Cupola and llama.cpp in turn (A B A B ...) on one model file and writes a record of every run.

    benches/record.py kernel --model FILE --llama-bin DIR --rounds 5 --out benches/record/CPU/DATE-kernel.csv
    benches/record.py serve  --model FILE --llama-bin DIR --rounds 3 --out benches/record/CPU/DATE-serve.csv

`kernel` compares `cupola bench kernel` with `llama-bench -fa 1`; `serve` drives `cupola serve` and `llama-server -fa on`
with the same client, `cupola bench serve`. Without --llama-bin only Cupola runs. Medians and ratios are printed last.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

THREADS = "2"


def cpu_name():
    with open("/proc/cpuinfo") as info:
        names = [line.split(":", 1)[1].strip() for line in info if line.startswith("model name")]
    return f"{names[0]} x{len(names)}" if names else platform.processor()


def run_json(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def cupola_kernel(args, shape):
    rows = run_json([args.cupola, "bench", "kernel", "-m", args.model, "-t", THREADS, "-r", "3", "-o", "json", *shape])
    return {row["test"]: row["median_ts"] for row in rows}


def llama_kernel(args, shape):
    command = [f"{args.llama_bin}/llama-bench", "-m", args.model, "-t", THREADS, "-r", "3", "-fa", "1", "-o", "json"]
    rows = run_json(command + shape)
    name = lambda r: f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}"
    depth = lambda r: f" @ d{r['n_depth']}" if r.get("n_depth") else ""
    return {name(row) + depth(row): statistics.median(row["samples_ts"]) for row in rows}


def kernel(args, record):
    for round_ in range(args.rounds):
        for name, value in cupola_kernel(args, ["-p", "512", "-n", "128"]).items():
            record(round_, "cupola", name, value)
        if args.llama_bin:
            for name, value in llama_kernel(args, ["-p", "512", "-n", "128"]).items():
                record(round_, "llama.cpp", name, value)
    for batch in ("4", "16", "32"):
        for name, value in cupola_kernel(args, ["-p", "0", "-n", "128", "-b", batch]).items():
            record(0, "cupola", name, value)


class Served:
    """A server process that answers on `url` while the block runs."""

    def __init__(self, command, url):
        self.command, self.url = command, url

    def __enter__(self):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT)
        for _ in range(600):
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(f"{' '.join(self.command)} ended:\n{self.log.read()[-2000:]}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).read()
                return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        sys.exit(f"{self.url} did not come up")

    def memory(self):
        """Peak resident bytes."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return int(re.search(r"VmHWM:\s+(\d+)", status.read()).group(1)) * 1024

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def servers(args):
    yield "cupola", [args.cupola, "serve", args.model, "--port", "9921", "--threads", THREADS, "--max-model-len", "2048"], 9921
    if args.llama_bin:
        yield "llama.cpp", [
            f"{args.llama_bin}/llama-server", "-m", args.model, "-t", THREADS, "-np", "32", "-c", "32768", "-fa", "on",
            "--host", "127.0.0.1", "--port", "9922",
        ], 9922


def serve(args, record):
    for round_ in range(args.rounds):
        for name, command, port in servers(args):
            with Served(command, f"http://127.0.0.1:{port}") as server:
                for concurrency in args.concurrency:
                    result = run_json([
                        args.cupola, "bench", "serve", "--base-url", server.url, "--json", "--num-warmups", "1",
                        "--num-prompts", str(max(4, 3 * concurrency)), "--max-concurrency", str(concurrency),
                        "--random-input-len", "128", "--random-output-len", "128", "--ignore-eos", "--temperature", "0",
                        "--seed", str(100 * round_ + concurrency),
                    ])
                    for key in ("output_throughput", "median_ttft_ms", "median_itl_ms", "failed"):
                        record(round_, name, f"c{concurrency} {key}", result[key])
                record(round_, name, "peak_rss_mib", server.memory() / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernel", "serve"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cupola", default="target/release/cupola")
    parser.add_argument("--llama-bin", help="folder with llama-bench and llama-server")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    rows = []

    def record(round_, engine, test, value):
        rows.append((round_, engine, test, value))
        print(f"round {round_}  {engine:10} {test:28} {value:10.2f}", file=sys.stderr)

    {"kernel": kernel, "serve": serve}[args.what](args, record)

    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out, "w", newline="") as out:
        # The command, without the folders of the machine it ran on.
        words = [os.path.basename(word) if "/" in word else word for word in sys.argv]
        out.write(f"# {datetime.date.today()} {cpu_name()}, {THREADS} threads, {' '.join(words)}\n")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["round", "engine", "test", "value"])
        writer.writerows((r, e, t, f"{v:.3f}") for r, e, t, v in rows)

    values = {}
    for _, engine, test, value in rows:
        values.setdefault(test, {}).setdefault(engine, []).append(value)
    print(f"{'test':30} {'cupola':>10} {'llama.cpp':>10} {'ratio':>7}   medians of up to {args.rounds}")
    for test, by_engine in values.items():
        medians = {engine: statistics.median(v) for engine, v in by_engine.items()}
        ours, theirs = medians.get("cupola"), medians.get("llama.cpp")
        ratio = f"{ours / theirs:7.2f}" if ours is not None and theirs else ""
        show = lambda v: f"{v:10.1f}" if v is not None else " " * 10
        print(f"{test:30} {show(ours)} {show(theirs)} {ratio}")


if __name__ == "__main__":
    main()
