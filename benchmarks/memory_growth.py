"""What answered requests leave in a server's memory: resident bytes after many requests less those after some.

Starts `qwenkit serve` and asks --requests completions of --tokens prompt tokens each, all prompts different. The cache is small
(--kv-memory), so that it is full, and resident, before memory is first looked at. The target is at most --target MiB more
after all of them than after the first --settled.

    python benchmarks/memory_growth.py                     smollm2, 2,000 requests of 1,000 tokens, target 10 MiB
    python benchmarks/memory_growth.py --requests 600 --settled 200 --tokens 200

Prints a JSON summary; exit code 1 where the target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from typing import Any

from served import Served, ask

MIB = 2**20


async def measure(server: Served, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(requests answered, resident bytes) as it goes on."""
    rng = random.Random(0)
    limit = asyncio.Semaphore(args.concurrency)
    seen: list[tuple[int, int]] = []

    async def one(number: int) -> None:
        prompt = [rng.randrange(250) for _ in range(args.tokens)]
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "stream": number % 2 == 0}
        async with limit:
            answer = await ask(server.port, "/v1/completions", body)
        if answer.status != 200:
            raise SystemExit(f"request {number} was answered {answer.status}: {answer.body[:300]!r}")

    step = min(args.settled, 250)
    for first in range(0, args.requests, step):
        last = min(first + step, args.requests)
        await asyncio.gather(*(one(number) for number in range(first, last)))
        await asyncio.sleep(1.0)
        seen.append((last, server.resident))
        print(f"{last} requests: {seen[-1][1] / MIB:.1f} MiB", file=sys.stderr)
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--settled", type=int, default=500, help="requests before memory is first looked at")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--kv-memory", default="256MiB")
    parser.add_argument("--target", type=float, default=10.0, help="MiB")
    args = parser.parse_args()
    with Served(args.model, "--kv-memory", args.kv_memory) as server:
        seen = asyncio.run(measure(server, args))
    settled = next(resident for count, resident in seen if count >= args.settled)
    grown = (seen[-1][1] - settled) / MIB
    summary = {
        "resident_mib": {str(count): round(resident / MIB, 1) for count, resident in seen},
        "grown_mib": round(grown, 1),
        "target_mib": args.target,
    }
    print(json.dumps(summary, indent=2))
    if grown > args.target:
        print(f"{grown:.1f} MiB more than after {args.settled} requests, allowed are {args.target}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
