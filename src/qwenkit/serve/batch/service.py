"""The batch API of one server: its data folder, its limits and its worker, opened when first needed.

In: the app and its Server. Out: `the_batches`, which routes ask for, and `start` and `stop` for whoever runs the app. A server
that nobody sends files to leaves no trace on disk; one whose folder holds batches goes on with them when it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request

from qwenkit.serve.batch.rows import BatchLimits
from qwenkit.serve.batch.store import DATABASE, BatchStore
from qwenkit.serve.batch.worker import BatchWorker
from qwenkit.serve.body import reader_of
from qwenkit.serve.caller import caller
from qwenkit.serve.errors import ApiError
from qwenkit.serve.server import Server
from qwenkit.storage import cache_folder

log = logging.getLogger("qwenkit.serve")


class Batches:
    """What the routes of files and batches need. One for an app; not shared between event loops."""

    def __init__(self, app: FastAPI, server: Server) -> None:
        config = server.config
        self.limits = BatchLimits(
            max_file_bytes=config.bytes_of("max_file"),
            max_lines=config.max_batch_lines,
            disk_quota=config.bytes_of("state_disk"),
            key_quota=config.bytes_of("state_disk_per_key"),
            key_batches=config.max_batches,
        )
        self.folder = Path(config.state_dir) if config.state_dir else default_folder(server.model_name)
        self.receiving: dict[str, tuple[str, int]] = {}  # uploads under way: file id -> owner, bytes so far
        self._app, self._server = app, server
        self._worker: BatchWorker | None = None
        self._opening = asyncio.Lock()
        self._stopped = False

    async def start(self) -> None:
        """Go on with the batches of an earlier run. Raises ValueError if another server uses a folder that was asked for."""
        if not (self.folder / DATABASE).exists():
            return
        try:
            await self.worker()
        except ApiError as error:
            if self._server.config.state_dir:
                raise ValueError(error.message) from None
            log.warning("no batches in this server: %s", error.message)

    async def stop(self) -> None:
        """Let go of all work in progress; the next start goes on with it. Before the engine is drained."""
        async with self._opening:
            self._stopped = True
            if self._worker is not None:
                await self._worker.stop()
                self._worker = None

    async def worker(self) -> BatchWorker:
        """The running worker. Raises ApiError 503 where the folder cannot be used, or the server is stopping."""
        async with self._opening:
            if self._stopped:
                raise ApiError(503, "the server is shutting down", "server_error", code="shutting_down")
            if self._worker is None:
                try:
                    store = await asyncio.to_thread(BatchStore, self.folder)
                except (ValueError, OSError, sqlite3.Error) as error:
                    log.warning("the folder of files and batches cannot be used: %s", error)
                    sentence = (
                        str(error) if isinstance(error, ValueError) else "the folder for files and batches is unusable"
                    )
                    raise ApiError(503, sentence, "server_error", code="batches_unavailable") from None
                self._worker = self._make(store)
                self._worker.start()
            return self._worker

    def _make(self, store: BatchStore) -> BatchWorker:
        driver, config = self._server.driver, self._server.config
        concurrency = min(config.batch_concurrency, max(1, config.max_queued // 2))
        few = max(2, concurrency // 4)
        return BatchWorker(
            self._app,
            store,
            self.limits,
            concurrency=concurrency,
            max_line_bytes=config.bytes_of("max_body"),
            crowded=lambda: driver.draining or driver.num_waiting >= few,
            serves=self._app.state.keys.has,
            max_values=reader_of(self._app).max_values,
        )

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the store by name, off the event loop."""
        worker = await self.worker()
        return await worker.call(getattr(worker.store, method), *args, **kwargs)

    async def make_room(self, owner: str, more: int = 0) -> None:
        """Raises ApiError 413 where `more` bytes beyond what is held and being received are too many for key or disk."""
        for who, quota, what in (
            (owner, self.limits.key_quota, "this key may keep"),
            (None, self.limits.disk_quota, "this server keeps"),
        ):
            size, files = await self.call("held", who)
            size += sum(count for name, count in self.receiving.values() if who in (None, name))
            if size + more > quota:
                raise ApiError(
                    413,
                    f"{what} {quota} bytes of files, delete some first",
                    param="file",
                    code="storage_quota_exceeded",
                )
            if who is not None and files >= self.limits.key_files:
                raise ApiError(
                    413, f"{what} {self.limits.key_files} files, delete some first", param="file", code="too_many_files"
                )


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Part of the app's life: goes on with what an earlier run left, lets go at the end."""
    app.state.batches = Batches(app, app.state.server)
    await app.state.batches.start()
    yield
    await app.state.batches.stop()


def the_batches(request: Request) -> Batches:
    """The batch API of the app that a request came to."""
    return batches_of(request.app)


def batches_of(app: FastAPI) -> Batches:
    """The batch API of an app, made when it is first asked for."""
    if not hasattr(app.state, "batches"):
        app.state.batches = Batches(app, app.state.server)
    batches = app.state.batches
    assert isinstance(batches, Batches)
    return batches


def owner() -> str:
    """Whose files and batches the running request may see: the namespace of its key."""
    return caller.get().namespace


def default_folder(model_name: str) -> Path:
    """A folder of its own for each model, so that a batch is never taken up by a server of another one."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", model_name)[-60:].strip("-")
    return cache_folder() / "serve" / f"{readable}-{hashlib.sha256(model_name.encode()).hexdigest()[:8]}"
