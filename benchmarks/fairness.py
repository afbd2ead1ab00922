"""Two API keys on one server: how long one waits for its first token while the other has asked for very much.

Starts `qwenkit serve` with two keys and the default engine settings. The light key's streamed chats are timed alone, then again
while the heavy key has --requests requests of n = --n answers under way. The target is a median first token within --target times
that of the light key alone. Each chat begins differently, so that the prefix cache helps neither measurement.

    python benchmarks/fairness.py                      smollm2, 64 requests of 16 answers, target 3
    python benchmarks/fairness.py --words 200 --prompt-words 200

Prints a JSON summary; exit code 1 where the target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from statistics import median
from typing import Any

from served import Served, connection

WORDS = "river stone paper night seven green engine window letter garden winter music door salt bread".split()  # noqa: SIM905
HEAVY, LIGHT = "heavy-key", "light-key"


def post(path: str, key: str, body: dict[str, Any]) -> bytes:
    """The bytes of a POST request of `key` with a JSON body."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


async def first_token(port: int, text: str) -> float:
    """Seconds from a streamed chat of the light key to the first piece of its answer; the answer is read to its end."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "ignore_eos": True, "stream": True}
    began, first, seen = time.perf_counter(), 0.0, b""
    async with connection(port, post("/v1/chat/completions", LIGHT, body)) as (reader, _):
        while part := await reader.read(1 << 16):
            seen += part
            if not first and b'"content":"' in seen.replace(b'"content":""', b""):
                first = time.perf_counter() - began
    if not first or b"[DONE]" not in seen:
        raise SystemExit(f"the light key's chat was not answered: {seen[-500:].decode(errors='replace')}")
    return first


async def flood(port: int, body: dict[str, Any]) -> None:
    """One request of the heavy key, whose answer nobody looks at."""
    async with connection(port, post("/v1/completions", HEAVY, body)) as (reader, _):
        while await reader.read(1 << 20):
            pass


async def measure(port: int, args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(args.seed)

    async def chats() -> list[float]:
        times = []
        for _ in range(args.repeats):
            await asyncio.sleep(rng.random() * 0.3)
            times.append(await first_token(port, words(rng, args.words)))
        return times

    await chats()  # the first steps of a server record and warm up
    alone = await chats()
    heavy = [
        asyncio.create_task(
            flood(
                port,
                {
                    "prompt": words(rng, args.prompt_words),
                    "n": args.n,
                    "max_tokens": args.max_tokens,
                    "ignore_eos": True,
                    "stream": args.stream,
                },
            )
        )
        for _ in range(args.requests)
    ]
    await asyncio.sleep(0.2)
    beside = await chats()
    unfinished = sum(not task.done() for task in heavy)
    for task in heavy:
        task.cancel()
    await asyncio.gather(*heavy, return_exceptions=True)
    return {
        "alone_ms": [round(1000 * seconds, 1) for seconds in alone],
        "beside_ms": [round(1000 * seconds, 1) for seconds in beside],
        "alone_median_ms": round(1000 * median(alone), 1),
        "beside_median_ms": round(1000 * median(beside), 1),
        "ratio": round(median(beside) / median(alone), 2),
        "worst_ratio": round(max(beside) / median(alone), 2),
        "heavy_requests_unfinished": unfinished,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--prompt-words", type=int, default=20, help="length of the heavy key's prompts")
    parser.add_argument("--words", type=int, default=60, help="length of the light key's messages")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--stream", action="store_true", help="the heavy key's answers are streamed")
    parser.add_argument("--target", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of qwenkit serve, at the end")
    args = parser.parse_args()
    with Served(args.model, "--api-key", HEAVY, "--api-key", LIGHT, *args.serve) as server:
        summary = asyncio.run(measure(server.port, args))
    print(json.dumps(summary | {"target": args.target}, indent=2))
    if not summary["heavy_requests_unfinished"]:
        print("the heavy key was done before the light key: give it more to do", file=sys.stderr)
        return 1
    if summary["ratio"] > args.target:
        print(f"the first token took {summary['ratio']} times as long, allowed is {args.target}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
