"""The worker: exactly one result for each line, whatever happens; low priority, fair turns, retries, ends."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwenkit.serve.batch.rows import BatchRow
from qwenkit.serve.batch.store import BatchStore
from tests.conftest import ROOT
from tests.serve.batch.echo_app import EchoApp, add_batch, records, request_line, until, worker


def now(store: BatchStore, batch: BatchRow) -> BatchRow:
    row = store.batch(batch.owner, batch.id)
    assert row is not None
    return row


async def finished(store: BatchStore, *batches: BatchRow) -> list[BatchRow]:
    open_states = ("validating", "in_progress", "finalizing", "cancelling")
    await until(lambda: all(now(store, batch).status not in open_states for batch in batches))
    return [now(store, batch) for batch in batches]


def test_lines_become_results(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [request_line(n) for n in range(10)]
    lines += [
        request_line(10, status=400),
        request_line(11, status=[429, 503, 200]),
        request_line(12, crash=True),
        request_line(13, status=500),
        request_line(14, stream=True),
        request_line(15, status=[500, 200]),
    ]

    async def run() -> None:
        app, store = EchoApp(0.005), BatchStore(tmp_path)
        running = worker(app, store)
        running.start()
        batch = add_batch(store, lines, owner="key")
        running.wake()
        [done] = await finished(store, batch)
        output, error = records(store, done, "output"), records(store, done, "error")
        assert (done.status, done.total, done.completed, done.failed) == ("completed", 16, 12, 4)
        assert [r["custom_id"] for r in output] == [f"line-{n}" for n in (*range(10), 11, 15)], (
            "in the order of the input"
        )
        assert [r["response"]["body"]["echo"] for r in output] == [*range(10), 11, 15]
        assert all(r["error"] is None and r["response"]["status_code"] == 200 for r in output)
        assert [r["response"] and r["response"]["status_code"] for r in error] == [400, None, 500, 400]
        assert error[1]["error"]["code"] == "server_error"
        assert (done.input_tokens, done.output_tokens, done.model) == (36, 24, "tiny")
        assert {(who.namespace, who.priority) for who, _ in app.asked} == {("key", -1)}
        assert app.most == 4
        assert not store.results(batch.seq, 0, 10), "the rows are gone once the file is there"
        await running.stop()

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(run())


def test_bad_input_fails_the_batch(tmp_path: Path) -> None:
    async def run() -> None:
        store = BatchStore(tmp_path)
        running = worker(EchoApp(), store)
        batches = [add_batch(store, b"bad\n"), add_batch(store, [request_line(1)])]
        store.path(batches[1].input_file_id).unlink()
        running.start()
        failed = await finished(store, *batches)
        shown = [batch.public() for batch in failed]
        assert [batch["status"] for batch in shown] == ["failed", "failed"]
        assert [batch["errors"]["data"][0]["code"] for batch in shown] == ["invalid_json_line", "file_not_found"]
        await running.stop()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_an_early_end_keeps_what_is_done(tmp_path: Path, how: str) -> None:
    async def run() -> None:
        clock = [1000.0]
        app, store = EchoApp(0.01), BatchStore(tmp_path, clock=lambda: clock[0])
        running = worker(app, store)
        running.start()
        batch = add_batch(store, [request_line(n) for n in range(20)])
        running.wake()
        await until(lambda: now(store, batch).completed >= 5)
        app.gate.clear()
        await until(lambda: app.running == 4)
        count = now(store, batch).completed
        if how == "cancelled":
            assert store.cancel(batch.seq)
        else:
            clock[0] += 3600
        running.wake()
        [done] = await finished(store, batch)
        assert app.running == 0, "lines that were being answered are let go"
        output, error = records(store, done, "output"), records(store, done, "error")
        assert (done.status, done.completed, len(output)) == (how, count, count)
        assert {r["error"]["code"] for r in error} == {f"batch_{how}"}
        assert sorted(r["custom_id"] for r in output + error) == sorted(f"line-{n}" for n in range(20))
        await running.stop()

    asyncio.run(run())


def test_a_batch_that_expires_before_it_is_read_names_its_requests(tmp_path: Path) -> None:
    async def run() -> None:
        clock = [1000.0]
        app, store = EchoApp(), BatchStore(tmp_path, clock=lambda: clock[0])
        batch = add_batch(store, [request_line(n) for n in range(3)])
        clock[0] = float(batch.expires_at)
        running = worker(app, store)
        running.start()
        [done] = await finished(store, batch)
        assert (done.status, done.total, done.output_file_id) == ("expired", 3, None)
        error = records(store, done, "error")
        assert [r["custom_id"] for r in error] == ["line-0", "line-1", "line-2"]
        assert {r["error"]["code"] for r in error} == {"batch_expired"}
        assert app.asked == []
        await running.stop()

    asyncio.run(run())


def test_stop_and_go_on(tmp_path: Path) -> None:
    """Lines under way at a stop are begun again by the next worker; no line that is done is asked twice."""

    async def run() -> None:
        first = EchoApp(0.01)
        store = BatchStore(tmp_path)
        batch = add_batch(store, [request_line(n) for n in range(40)])
        running = worker(first, store)
        running.start()
        await until(lambda: now(store, batch).completed >= 9)
        await running.stop()
        store = BatchStore(tmp_path)
        kept = now(store, batch).completed
        second = EchoApp()
        running = worker(second, store)
        running.start()
        [done] = await finished(store, batch)
        assert len(second.asked) == 40 - kept
        assert sorted(r["custom_id"] for r in records(store, done, "output")) == sorted(f"line-{n}" for n in range(40))
        await running.stop()

    asyncio.run(run())


def test_turns_are_fair(tmp_path: Path) -> None:
    """Two keys share evenly however many batches each has; a late small batch does not wait for an early large one."""

    async def run() -> None:
        app, store = EchoApp(0.002), BatchStore(tmp_path)
        large = [add_batch(store, [request_line(n, say=f"a{b}") for n in range(60)], owner="a") for b in range(3)]
        small = add_batch(store, [request_line(n, say="b") for n in range(30)], owner="b")
        running = worker(app, store)
        running.start()
        await finished(store, small)
        asked = [say for _, say in app.asked]
        counts = Counter(asked[: len(asked) - asked[::-1].index("b")])  # until the small batch's last line
        mine = [counts[f"a{b}"] for b in range(3)]
        assert max(mine) < 60, "the small one did not wait for a large one"
        assert abs(sum(mine) - counts["b"]) <= 24, counts
        assert max(mine) - min(mine) <= 6, counts
        await finished(store, *large)
        await running.stop()

    asyncio.run(run())


def test_batches_wait_while_people_do(tmp_path: Path) -> None:
    async def run() -> None:
        crowd = [True]
        app, store = EchoApp(), BatchStore(tmp_path)
        batches = [add_batch(store, [request_line(n) for n in range(5)], owner=who) for who in ("known", "gone")]
        running = worker(app, store, crowded=lambda: crowd[0], serves=lambda owner: owner == "known")
        running.start()
        await until(lambda: all(now(store, batch).status == "in_progress" for batch in batches))
        await asyncio.sleep(0.2)
        assert not app.asked
        crowd[0] = False
        await finished(store, batches[0])
        assert {who.namespace for who, _ in app.asked} == {"known"}, "a key that is gone gets nothing more"
        await running.stop()

    asyncio.run(run())


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        app, store = EchoApp(), BatchStore(tmp_path)
        put, fails = store.put_result, [3]

        def full(*args: Any, **kwargs: Any) -> bool:
            if fails[0]:
                fails[0] -= 1
                raise OSError(28, "No space left on device")
            return put(*args, **kwargs)

        monkeypatch.setattr(store, "put_result", full)
        monkeypatch.setattr("qwenkit.serve.batch.worker.TICK", 0.02)
        batch = add_batch(store, [request_line(n) for n in range(6)])
        running = worker(app, store)
        running.start()
        [done] = await finished(store, batch)
        assert (done.completed, len(app.asked)) == (6, 6), "answers are kept until they can be stored"
        await running.stop()

    with caplog.at_level(logging.CRITICAL):
        asyncio.run(run())


def test_killed_again_and_again(tmp_path: Path) -> None:
    """kill -9 at random moments; the last process finishes, and every line of every batch is there exactly once."""
    store = BatchStore(tmp_path)
    batches = [add_batch(store, [request_line(n) for n in range(60)], owner=str(b % 2)) for b in range(3)]
    batches.append(add_batch(store, b"bad\n"))
    store.close()
    command = [sys.executable, "-m", "tests.serve.batch.echo_app", str(tmp_path)]
    moments = random.Random(4)
    kills = 0
    while kills < 8:
        with subprocess.Popen([*command, "0.05"], cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moments.uniform(0.0, 0.25))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    subprocess.run([*command, "0"], cwd=ROOT, check=True, timeout=120)
    store = BatchStore(tmp_path)
    done = [now(store, batch) for batch in batches]
    assert [batch.status for batch in done] == ["completed"] * 3 + ["failed"]
    for batch in done[:3]:
        assert [r["custom_id"] for r in records(store, batch, "output")] == [f"line-{n}" for n in range(60)]
        assert (batch.completed, batch.failed) == (60, 0)
    known = {row.id for owner in ("", "0", "1") for row in store.files(owner, None, None, 100, True)}
    assert {path.name for path in (tmp_path / "files").iterdir()} == known, "no file is left over"
    assert kills >= 3, "it was killed while it worked"
    store.close()
