"""Decoding beside another process that keeps one core busy: tokens a second and processor time, for one thread and the default.

Two processes load the model, one with OMP_NUM_THREADS=1 and one as it comes. They decode in turn, never at the same time, alone
and beside a process that computes without a pause; nothing is pinned to a core. A figure is the median over the rounds.

    python benchmarks/busy.py                                      smollm2, int4
    python benchmarks/busy.py FOLDER --weights int8 --rounds 9
    python benchmarks/busy.py --peer /other/checkout/.venv/bin/python    the same figures of another build, turn about

Targets: beside the busy process the default thread count gives at least --least (0.8) times what one thread gives there; with
--peer it also gives, alone, at least --quiet (0.99) times the other build's speed. Prints a table; exit code 1 where a target
is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import TypeAlias

THREADS_OF_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
SETTLE_S = 0.2  # between starting or ending the busy process and the next measurement
Case: TypeAlias = tuple[str, str, bool]  # build, threads, beside a busy process


class Decoder:
    """A process that has loaded the model and decodes when told to."""

    def __init__(self, python: str, args: argparse.Namespace, threads: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in THREADS_OF_USER}
        if threads == "1":
            environment |= dict.fromkeys(THREADS_OF_USER, "1")
        command = [python, __file__, args.model, "--weights", args.weights, "--tokens", str(args.tokens), "--decoder"]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._receive()

    def decode(self) -> tuple[float, float]:
        """Tokens a second of one request, and processor seconds for a thousand tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write("decode\n")
        self._process.stdin.flush()
        speed, cpu_s = self._receive()
        return speed, cpu_s

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _receive(self) -> list[float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the decoding process ended (exit code {self._process.wait()})")
        numbers: list[float] = json.loads(line)
        return numbers


def serve_decoder(args: argparse.Namespace) -> None:
    """Load the model, then decode once for each line of standard input."""
    from qwenkit import LLM, SamplingParams

    llm = LLM(args.model, weights=args.weights, max_model_len=args.tokens + 64)
    params = SamplingParams(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, max_tokens=args.tokens, ignore_eos=True
    )
    prompt = llm.encode("Once upon a time there was a river that")

    def decode() -> tuple[float, float]:
        llm.engine.add(prompt, params)
        llm.engine.step()  # the prompt
        start, cpu_start = time.perf_counter(), time.process_time()
        count = 0
        while llm.engine.has_work:
            count += sum(len(delta.token_ids) for delta in llm.engine.step())
        return count / (time.perf_counter() - start), (time.process_time() - cpu_start) / count * 1000

    decode()
    print("[]", flush=True)
    for _ in sys.stdin:
        print(json.dumps(decode()), flush=True)


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that computes without a pause."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        process.kill()
        process.wait()
        time.sleep(SETTLE_S)


def measure(args: argparse.Namespace, builds: dict[str, str]) -> dict[Case, tuple[float, float]]:
    """Median speed and processor time of every case, measured in turn."""
    decoders = {
        (build, threads): Decoder(python, args, threads)
        for build, python in builds.items()
        for threads in ("1", "default")
    }
    runs: dict[Case, list[tuple[float, float]]] = {}
    try:
        for _ in range(args.rounds):
            for key, decoder in decoders.items():
                runs.setdefault((*key, False), []).append(decoder.decode())
            with busy_process():
                for key, decoder in decoders.items():
                    runs.setdefault((*key, True), []).append(decoder.decode())
    finally:
        for decoder in decoders.values():
            decoder.close()
    return {case: (median(speed for speed, _ in of), median(cpu for _, cpu in of)) for case, of in runs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Decoding beside another process that keeps one core busy.")
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--least", type=float, default=0.8, help="default threads over one thread, both beside the busy process"
    )
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of another build to compare with")
    parser.add_argument(
        "--quiet", type=float, default=0.99, help="this build over the other one, default threads, alone"
    )
    parser.add_argument("--decoder", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decoder:
        serve_decoder(args)
        return 0
    builds = {"this": sys.executable} | ({"peer": args.peer} if args.peer else {})
    results = measure(args, builds)
    print(f"{'build':<6} {'threads':<8} {'machine':<8} {'tok/s':>8} {'cpu s / 1000 tok':>18}")
    for (build, threads, busy), (speed, cpu_s) in results.items():
        print(f"{build:<6} {threads:<8} {'busy' if busy else 'alone':<8} {speed:>8.1f} {cpu_s:>18.2f}")
    ratios = {}
    for build in builds:
        speeds = {
            key: results[(build, *key)][0] for key in (("1", False), ("1", True), ("default", False), ("default", True))
        }
        ratios[build] = speeds["default", True] / speeds["1", True]
        print(
            f"{build}: beside the busy process, default threads / one thread: {ratios[build]:.2f} (at least {args.least})"
        )
        print(f"{build}: default threads, busy / alone: {speeds['default', True] / speeds['default', False]:.2f}")
    missed = ratios["this"] < args.least
    if args.peer:
        quiet = results["this", "default", False][0] / results["peer", "default", False][0]
        print(f"alone, default threads, this / peer: {quiet:.3f} (at least {args.quiet})")
        missed |= quiet < args.quiet
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
