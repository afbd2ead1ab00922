"""A server under load for minutes: many streams at once, clients that leave, requests that are too large or make no sense.

Starts `qwenkit serve` itself and holds --streams conversations with it for --minutes. It is watched that every request that was
accepted and not left is answered whole (as many token ids as the usage says, a finish reason, [DONE]); that refusals are the
right 4xx; that answers under load are those of the same request alone (greedy, a sample); that no block, answer or queue place is
left over; that resident memory after the first minute and at the end differ by at most 5 %; that 99 % of /health answers come
within 200 ms; that nothing is a 5xx, the log holds no error, and SIGTERM ends it with exit code 0.

    python benchmarks/soak.py                                  smollm2, 200 streams, 5 minutes
    python benchmarks/soak.py smollm2 --minutes 1 --streams 50 --kv-memory 128MiB
    python benchmarks/soak.py attacks smollm2                  hostile clients instead of load: see attacks.py

The cache is small (--kv-memory) so that it is full, and resident, before memory is first looked at, and so that answers are
preempted. Prints a JSON summary; exit code 1 and the reasons on standard error where a line was violated.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import attacks
from served import Answer, Served, ask, connection, head, reset_on_close, send

WORDS = "river stone paper night seven green engine window letter garden winter music door salt bread".split()  # noqa: SIM905
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
MALFORMED: list[tuple[str, str, bytes, set[int]]] = [
    ("POST", "/v1/chat/completions", b'{"model": "served", "messages": [', {400}),
    ("POST", "/v1/chat/completions", b"\xff\xfe\x00", {400}),
    ("POST", "/v1/chat/completions", b'{"model": "served", "messages": []}', {400}),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000000000}', {400}),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temprature": 1}', {400}),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', {400}),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "n": 100000}', {400}),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999999": 1}}', {400}),
    ("POST", "/v1/chat/completions", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', {404}),
    ("POST", "/v1/completions", b'{"model": "served", "prompt": [1, 2, 99999999]}', {400}),
    ("POST", "/v1/completions", b'{"model": "served", "prompt": ""}', {400}),
    ("POST", "/v1/completions", b'{"model": "served", "prompt": "x", "guided_regex": "(("}', {400}),
    ("POST", "/v1/completions", b'{"prompt": ' + b"[" * 5000, {400}),
    ("POST", "/v1/messages", b'{"model": "served", "max_tokens": 0, "messages": 7}', {400}),
    ("POST", "/v1/responses", b'{"model": "served", "input": {"a": 1}}', {400}),
    ("POST", "/v1/batches", b'{"input_file_id": "../../etc/passwd"}', {400, 404}),
    ("POST", "/tokenize", b"7", {400}),
    ("GET", "/v1/chat/completions", b"", {405}),
    ("GET", "/v1/nothing", b"", {404}),
    ("POST", "/v1/load_lora_adapter", b'{"lora_name": "x", "lora_path": "/etc"}', {403}),
]  # fmt: skip


@dataclass
class Seen:
    """What happened."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    sample: list[tuple[dict[str, Any], list[list[int]]]] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    def complain(self, what: str) -> None:
        self.wrong.append(what[:500])


class Client:
    """One of many that talk to the server at the same time, each with a random mind of its own."""

    def __init__(self, port: int, seed: int, seen: Seen) -> None:
        self.port, self.rng, self.seen = port, random.Random(seed), seen
        self._kinds: list[tuple[Callable[[], Any], str, int]] = [
            (self.stream, "stream", 50),
            (self.whole, "whole", 12),
            (self.leave, "left while streaming", 12),
            (self.leave_early, "left while waiting", 6),
            (self.structured, "structured", 4),
            (self.malformed, "malformed", 10),
            (self.oversized, "oversized", 3),
            (self.odd_bytes, "odd bytes", 3),
        ]

    async def run(self, until: float) -> None:
        await asyncio.sleep(self.rng.random() * 2)
        while time.monotonic() < until:
            act, name, _ = self.rng.choices(self._kinds, [weight for *_, weight in self._kinds])[0]
            try:
                await act()
                self.seen.kinds[name] += 1
            except Exception as error:
                self.seen.complain(f"{name}: {type(error).__name__}: {error}")
            if self.rng.random() < 0.2:
                await asyncio.sleep(self.rng.random())

    def request(self, **more: Any) -> tuple[str, dict[str, Any]]:
        """(path, body) of something to answer, greedy one time in two."""
        rng = self.rng
        words = " ".join(rng.choices(WORDS, k=rng.choice((3, 10, 30, 120, 400))))
        body: dict[str, Any] = {"model": "served", "max_tokens": rng.randint(1, 96), "return_token_ids": True, **more}
        body["temperature"] = 0 if rng.random() < 0.5 else 1.0
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.2:
            body["stop"] = rng.sample(WORDS, 3)
        if rng.random() < 0.3:
            body["ignore_eos"] = True
        if rng.random() < 0.5:
            return "/v1/completions", body | {"prompt": words}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words}]}

    async def stream(self) -> None:
        path, body = self.request(stream=True, stream_options={"include_usage": True})
        answer = await ask(self.port, path, body)
        if not self.accepted(answer, path):
            return
        *pieces, last, done = answer.events()
        choices: dict[int, tuple[list[int], list[str]]] = {}
        for piece in pieces:
            for choice in piece["choices"]:
                ids, reasons = choices.setdefault(choice["index"], ([], []))
                ids += choice.get("token_ids") or []
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        if done != "[DONE]":
            self.seen.complain(f"a stream ended with {done}")
        self.check(path, body, [choices[index] for index in sorted(choices)], last["usage"])

    async def whole(self) -> None:
        path, body = self.request()
        answer = await ask(self.port, path, body)
        if self.accepted(answer, path):
            told = answer.json()
            choices = [(choice["token_ids"], [choice["finish_reason"]]) for choice in told["choices"]]
            self.check(path, body, choices, told["usage"])

    async def structured(self) -> None:
        path, body = "/v1/chat/completions", self.request()[1]
        given = {"model": "served", "max_tokens": 120, "return_token_ids": True, "temperature": body["temperature"]}
        given["messages"] = [{"role": "user", "content": "A person, as JSON."}]
        given["response_format"] = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
        answer = await ask(self.port, path, given)
        if self.accepted(answer, path):
            told = answer.json()
            choice = told["choices"][0]
            self.check(path, given, [(choice["token_ids"], [choice["finish_reason"]])], told["usage"])
            if choice["finish_reason"] == "stop" and set(json.loads(choice["message"]["content"])) != {"name", "age"}:
                self.seen.complain(f"structured: {choice['message']['content']}")

    def check(self, path: str, body: dict[str, Any], choices: list[tuple[list[int], list[str]]], usage: Any) -> None:
        """An answer is whole."""
        tokens = sum(len(ids) for ids, _ in choices)
        self.seen.tokens += tokens
        if tokens != usage["completion_tokens"] or not tokens:
            self.seen.complain(f"{path}: {tokens} token ids came, usage says {usage}")
        if len(choices) != body.get("n", 1):
            self.seen.complain(f"{path}: {len(choices)} answers came, n is {body.get('n', 1)}")
        for ids, reasons in choices:
            if len(reasons) != 1 or reasons[0] not in ("stop", "length"):
                self.seen.complain(f"{path}: finish reasons {reasons}")
            if reasons == ["length"] and len(ids) != body["max_tokens"]:
                self.seen.complain(f"{path}: cut at {len(ids)} tokens, max_tokens is {body['max_tokens']}")
        if body["temperature"] == 0:
            self.seen.sample.append(({"path": path, **body}, [ids for ids, _ in choices]))

    def accepted(self, answer: Answer, path: str) -> bool:
        self.seen.statuses[answer.status] += 1
        if answer.status == 429:
            if "retry-after" not in answer.headers:
                self.seen.complain(f"{path}: 429 without Retry-After")
            return False
        if answer.status != 200:
            self.seen.complain(f"{path}: {answer.status} {answer.body[:300]!r}")
        return answer.status == 200

    async def leave(self) -> None:
        """Go away in the middle of a stream, politely or not."""
        path, body = self.request(stream=True)
        data = json.dumps(body | {"max_tokens": 500, "ignore_eos": True}).encode()
        async with connection(self.port, head("POST", path, len(data)) + data) as (reader, writer):
            for _ in range(self.rng.randint(1, 12)):
                if not await reader.read(400):
                    break
            if self.rng.random() < 0.5:
                reset_on_close(writer)

    async def leave_early(self) -> None:
        """Go away before anything came: within the request, right after it, or after a moment."""
        path, body = self.request(stream=self.rng.random() < 0.5)
        data = json.dumps(body | {"max_tokens": 500, "ignore_eos": True}).encode()
        data = head("POST", path, len(data)) + data
        part = self.rng.choice((len(data) // 2, len(data), len(data)))
        async with connection(self.port, data[:part]) as (_, writer):
            await writer.drain()
            await asyncio.sleep(self.rng.choice((0, 0.01, 0.3, 2)))
            if self.rng.random() < 0.5:
                reset_on_close(writer)

    async def malformed(self) -> None:
        method, path, body, expected = self.rng.choice(MALFORMED)
        answer = await ask(self.port, path, body, method=method)
        self.seen.statuses[answer.status] += 1
        if answer.status not in expected or "error" not in answer.json():
            self.seen.complain(f"{method} {path} {body[:100]!r}: {answer.status} {answer.body[:200]!r}")

    async def oversized(self) -> None:
        """Bodies above the limit, announced or not."""
        body = b'{"prompt": "' + b"x" * (9 << 20)
        announced = self.rng.random() < 0.5
        data = head("POST", "/v1/completions", len(body) if announced else None)
        if not announced:
            data += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        try:
            answer = await send(self.port, data if not announced else data + body[: 1 << 16])
        except ConnectionError:  # it closed while the body was still being sent
            self.seen.kinds["oversized, closed"] += 1
            return
        self.seen.statuses[answer.status] += 1
        if answer.status != 413:
            self.seen.complain(f"oversized: {answer.status} {answer.body[:200]!r}")

    async def odd_bytes(self) -> None:
        """What is hardly HTTP: it may be refused or closed, no more."""
        choices = [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        ]
        try:
            async with connection(self.port, self.rng.choice(choices)) as (reader, _):
                first = await asyncio.wait_for(reader.read(4096), 30)
        except ConnectionError:
            return
        if first and not re.match(rb"HTTP/1.1 4\d\d ", first):
            self.seen.complain(f"odd bytes: {first[:100]!r}")


class Watch(threading.Thread):
    """Looks at memory and at /health ten times a second, in a thread that waits for nobody."""

    def __init__(self, served: Served, seen: Seen) -> None:
        super().__init__(daemon=True)
        self.served, self.seen, self.began, self.over = served, seen, time.monotonic(), threading.Event()

    def run(self) -> None:
        client = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=30)
        while not self.over.wait(0.1):
            start = time.perf_counter()
            try:
                client.request("GET", "/health")
                answer = client.getresponse()
                answer.read()
            except OSError as error:
                self.seen.complain(f"/health: {error}")
                client.close()
                continue
            self.seen.health.append(time.perf_counter() - start)
            self.seen.resident.append((time.monotonic() - self.began, self.served.resident))
            if answer.status != 200:
                self.seen.complain(f"/health says {answer.status}")


async def metrics(port: int) -> dict[str, float]:
    """Sums of the server's metrics by name."""
    sums: dict[str, float] = {}
    for line in (await ask(port, "/metrics", method="GET")).body.decode().splitlines():
        if line and not line.startswith("#"):
            name, value = re.split(r"[{ ]", line)[0].removeprefix("qwenkit:"), line.rsplit(" ", 1)[1]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


async def settled(port: int, seen: Seen) -> dict[str, float]:
    """The metrics once the load is over: nothing runs, nothing waits, no block is held."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for _ in range(100):
        found = await metrics(port)
        if not any(found[name] for name in names):
            return found
        await asyncio.sleep(0.1)
    seen.complain(f"left over: { {name: found[name] for name in names} }")
    return found


async def compare(port: int, seen: Seen, count: int, rng: random.Random) -> int:
    """How many greedy answers of the load come out otherwise when the same request is alone; each is a complaint."""
    differ = 0
    for body, ids in rng.sample(seen.sample, min(count, len(seen.sample))):
        alone = {name: value for name, value in body.items() if name not in ("path", "stream", "stream_options")}
        answer = (await ask(port, body["path"], alone)).json()
        again = [choice["token_ids"] for choice in answer["choices"]]
        if again != ids:
            differ += 1
            seen.complain(f"alone it is {again}, under load it was {ids}: {json.dumps(body)[:200]}")
    return differ


async def load(served: Served, seen: Seen, streams: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(Client(served.port, seed, seen).run(until) for seed in range(streams)))


def main() -> int:
    if sys.argv[1:2] == ["attacks"]:
        return attacks.main(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description="Load a server for minutes and check that it does everything it must.",
        epilog="Flags that are not known here go to `qwenkit serve`.",
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--kv-memory", default="96MiB", help="memory of the cache")
    parser.add_argument("--max-model-len", default="2048", help="context, which the cache must hold")
    parser.add_argument(
        "--sample", type=int, default=40, help="greedy answers that are compared with the request alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    given, flags = parser.parse_known_args()
    seen, seconds = Seen(), 60 * given.minutes
    minute = min(60.0, seconds / 5)

    flags += ["--kv-memory", given.kv_memory, "--max-model-len", given.max_model_len, "--log-format", "json"]
    with Served(given.model, *flags) as served:
        watch = Watch(served, seen)
        watch.start()
        asyncio.run(load(served, seen, given.streams, seconds))
        watch.over.set()
        watch.join()
        counts = asyncio.run(settled(served.port, seen))
        differ = asyncio.run(compare(served.port, seen, given.sample, random.Random(given.seed)))
        after = asyncio.run(settled(served.port, seen))
        code = served.terminate()
        errors = [line for line in served.log.splitlines() if '"ERROR"' in line or "Traceback" in line]

    warm = median(size for at, size in seen.resident if minute <= at < 2 * minute)
    end = median(size for at, size in seen.resident if at >= seconds - minute / 2)
    p99 = quantiles(seen.health, n=100)[98]
    refused = sum(value for name, value in after.items() if name.startswith("http_requests_total"))
    summary = {
        "model": given.model,
        "streams": given.streams,
        "minutes": given.minutes,
        "requests": dict(seen.kinds),
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "http_answers": refused,
        "tokens_received": seen.tokens,
        "tokens_generated": counts["generation_tokens_total"],
        "preemptions": counts["num_preemptions_total"],
        "resident_mb": {"after the first minute": round(warm / 1e6, 1), "at the end": round(end / 1e6, 1),
                        "change": round(end / warm - 1, 4)},
        "health_ms": {"p50": round(1e3 * median(seen.health), 1), "p99": round(1e3 * p99, 1),
                      "max": round(1e3 * max(seen.health), 1)},
        "compared_alone": min(given.sample, len(seen.sample)),
        "of_these_different": differ,
        "exit_code": code,
    }  # fmt: skip
    for name in ("corrupted_requests_total", "failed_requests_total"):
        if after[name]:
            seen.complain(f"{name} is {after[name]}")
    if any(status >= 500 for status in seen.statuses):
        seen.complain("there were answers of 5xx")
    if abs(end / warm - 1) > 0.05:
        seen.complain("resident memory is not flat")
    if p99 >= 0.2:
        seen.complain("/health took more than 200 ms")
    if seen.tokens > counts["generation_tokens_total"]:
        seen.complain("more tokens came than were generated")
    if code != 0:
        seen.complain(f"SIGTERM ended it with {code}")
    seen.wrong += [f"log: {line[:500]}" for line in errors]
    summary["violations"] = len(seen.wrong)
    print(json.dumps(summary, indent=2))
    for one in seen.wrong[:50]:
        print(one, file=sys.stderr)
    return int(bool(seen.wrong))


if __name__ == "__main__":
    sys.exit(main())
