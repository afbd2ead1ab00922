"""What the server costs the engine: output tokens a second through HTTP against those of the bare engine.

Both run in one go, turn about: a round is `qwenkit bench`'s batch (the same function, in this process) and then the same number
of streams with prompts of the same length against `qwenkit serve`, all sent at once, each of token ids, past the end token. The
two sides never compute at the same time. The ratio is the median over the rounds of server / engine.

    python benchmarks/serve_throughput.py                     smollm2, 16 streams, 128 in, 64 out
    python benchmarks/serve_throughput.py Qwen/Qwen3-0.6B --rounds 9 --least 0.92

Prints one line of JSON; exit code 1 where the ratio is below --least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

from served import Answer, Served, ask

from qwenkit.cli import bench_measure
from qwenkit.cli.bench import surroundings
from qwenkit.engine.llm import LLM


async def streams(port: int, prompts: list[list[int]], new: int) -> float:
    """Tokens a second of all prompts at once, timed from before the first is sent to the end of the last answer."""

    def body(prompt: list[int]) -> bytes:
        request = {"model": "served", "prompt": prompt, "max_tokens": new, "ignore_eos": True, "temperature": 0}
        return json.dumps(request | {"stream": True, "stream_options": {"include_usage": True}}).encode()

    bodies = [body(prompt) for prompt in prompts]
    start = time.perf_counter()
    answers: list[Answer] = await asyncio.gather(*(ask(port, "/v1/completions", data) for data in bodies))
    seconds = max(answer.last for answer in answers) - start
    tokens = sum(answer.events()[-2]["usage"]["completion_tokens"] for answer in answers)
    assert tokens == len(prompts) * new, f"{tokens} tokens came, {len(prompts)} times {new} were asked for"
    return tokens / seconds


def cpu_seconds(pid: int) -> float:
    """Seconds that the event loop's thread of a server has computed."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Output tokens a second of the server against the bare engine.",
        epilog="Flags that are not known here go to `qwenkit serve` and do not touch the bare engine.",
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after one that warms up")
    parser.add_argument("--least", type=float, default=0.0, help="ratio below which the exit code is 1")
    parser.add_argument("--weights", default="auto", help="as for qwenkit serve; both sides take it")
    given, flags = parser.parse_known_args()

    with Served(given.model, "--weights", given.weights, *flags) as served:
        llm = LLM(
            given.model,
            weights=given.weights,
            prefix_cache=False,
            max_model_len=given.prompt + given.new,
            max_num_seqs=given.streams,
        )
        prompts = bench_measure.Prompts(llm)
        engine: list[float] = []
        server: list[float] = []
        loop_seconds: list[float] = []
        for number in range(given.rounds + 1):
            run = bench_measure.run(llm, prompts.draw(given.streams, given.prompt), given.new)
            before = cpu_seconds(served.process.pid)
            speed = asyncio.run(streams(served.port, prompts.draw(given.streams, given.prompt), given.new))
            if number:
                engine.append(run.tokens / run.total_s)
                server.append(speed)
                loop_seconds.append(cpu_seconds(served.process.pid) - before)
            print(f"round {number}: engine {run.tokens / run.total_s:.1f}, server {speed:.1f} tok/s", file=sys.stderr)
    ratios = [one / other for one, other in zip(server, engine, strict=True)]
    record = {
        "model": given.model,
        "streams": given.streams,
        "prompt": given.prompt,
        "new": given.new,
        "weights": given.weights,
        "flags": flags,
        "engine_tok_s": round(median(engine), 1),
        "server_tok_s": round(median(server), 1),
        "ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in sorted(ratios)],
        "event_loop_us_per_token": round(1e6 * sum(loop_seconds) / (given.rounds * given.streams * given.new), 1),
        **surroundings(),
    }
    print(json.dumps(record))
    return int(record["ratio"] < given.least)


if __name__ == "__main__":
    sys.exit(main())
