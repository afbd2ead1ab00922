"""Tokenizing by several processes: blocks of records become columns of numbers, in the order of the files.

In: a Pipeline and the number of processes. Out: `Columns`, one for each block. Worker processes are new interpreters, not forks
of this one with its threads and their locks: each gets configuration, tokenizer and chat format as JSON, reads everything,
prepares every n-th block and sends its columns through a pipe as JSON and plain numbers. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Sample
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.pipeline import Pipeline, Prepared, Report
from qwenkit.train.data.registry import DataSource
from qwenkit.train.data.render import samples_of

logger = logging.getLogger(__name__)

TYPES = {
    "ids": "i",  # of all documents, end to end
    "learned": "B",  # 1 where the id is a label too
    "starts": "q",  # of each document in ids, and the end
    "files": "i",  # number of the file of each document
    "lines": "q",
    "units": "q",  # first document of each item, and the end
    "liked": "B",  # of each item: 2 for a sample, else a pair's flag
    "records": "q",  # of each item
}
BLOCK = 64  # records
BYTES_PER_WORKER = 1 << 20  # of files: about the second or two that a process takes to start

# A worker finds this package as its parent does. Nothing is imported before its path is the parent's: the working folder is on
# the path of `python -c`, and a file there may be called json.py.
_START = "import sys; sys.path[:] = sys.argv[1:]; from qwenkit.train.data.workers import main; main()"
_CHATS: dict[str, Callable[..., ChatFormat]] = {"jinja": JinjaChat, "qwen1": Qwen1Chat}


class Columns:
    """Items as columns of numbers, and the report on the records that they came from."""

    def __init__(self) -> None:
        self.report = Report()
        self._arrays = {name: array(code) for name, code in TYPES.items()}
        self._arrays["starts"].append(0)
        self._arrays["units"].append(0)
        self._tokens = self._documents = self._records = 0

    @property
    def num_waiting(self) -> int:
        """Ids that `flush` would write."""
        return len(self._arrays["ids"])

    def add(self, dataset: str, prepared: Prepared) -> None:
        """A record's items behind those that are here."""
        arrays = self._arrays
        self.report.add(dataset, prepared)
        for item in prepared.items:
            for sample in samples_of(item):
                arrays["ids"].extend(sample.ids)
                arrays["learned"].extend([label != IGNORE for label in sample.labels])
                self._tokens += len(sample.ids)
                self._documents += 1
                arrays["starts"].append(self._tokens)
                arrays["files"].append(prepared.file)
                arrays["lines"].append(prepared.record.line)
            arrays["units"].append(self._documents)
            arrays["liked"].append(2 if isinstance(item, Sample) else int(item.liked))
            arrays["records"].append(self._records)
        self._records += bool(prepared.items)

    def extend(self, other: Columns) -> None:
        """The items of a whole block behind those that are here; its report is not merged."""
        ours, theirs = self._arrays, other._arrays
        for name in ("ids", "learned", "files", "lines", "liked"):
            ours[name].extend(theirs[name])
        ours["starts"].extend(start + self._tokens for start in theirs["starts"][1:])
        ours["units"].extend(unit + self._documents for unit in theirs["units"][1:])
        ours["records"].extend(record + self._records for record in theirs["records"])
        self._tokens += other._tokens
        self._documents += other._documents
        self._records += other._records

    def flush(self, folder: Path, sizes: dict[str, int]) -> None:
        """Append the columns to files of a folder and forget them; sizes: entries of each file so far."""
        for name, values in self._arrays.items():
            with (folder / f"{name}.bin").open("ab") as file:
                values.tofile(file)
            sizes[name] += len(values)
            self._arrays[name] = array(TYPES[name])

    def send(self, pipe: IO[bytes]) -> None:
        counts = [self._tokens, self._documents, self._records]
        lengths = [len(values) for values in self._arrays.values()]
        header = json.dumps({"counts": counts, "lengths": lengths, "report": self.report.to_json()}).encode()
        pipe.write(struct.pack("<Q", len(header)) + header)
        for values in self._arrays.values():
            pipe.write(values.tobytes())
        pipe.flush()

    @classmethod
    def receive(cls, pipe: IO[bytes]) -> Columns | None:
        """None where the sender has no more. Raises ValueError with the sender's words if it failed."""
        size = pipe.read(8)
        if not size:
            return None
        header = json.loads(_exactly(pipe, *struct.unpack("<Q", size)))
        if "error" in header:
            raise ValueError(header["error"])
        columns = cls()
        columns.report = Report.from_json(header["report"])
        columns._tokens, columns._documents, columns._records = header["counts"]
        for (name, code), length in zip(TYPES.items(), header["lengths"], strict=True):
            values = array(code)
            values.frombytes(_exactly(pipe, length * values.itemsize))
            columns._arrays[name] = values
        return columns


def blocks(pipeline: Pipeline, num_workers: int) -> Iterator[Columns]:
    """The source's records in blocks, in order. Raises ValueError where a file is damaged as a whole or a worker dies.

    At most `num_workers` processes, and no more than the files' bytes keep busy: each takes seconds to start.
    """
    num_bytes = sum(path.stat().st_size for path in pipeline.source.files)
    num_workers = min(num_workers, num_bytes // BYTES_PER_WORKER)
    request = _request(pipeline) if num_workers > 1 else None
    if request is None:
        yield from _blocks(pipeline, 0, 1)
        return
    workers: list[subprocess.Popen[bytes]] = []
    whole = False
    try:
        for _ in range(num_workers):
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", _START, *sys.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
        for number, worker in enumerate(workers):
            assert worker.stdin is not None
            with suppress(BrokenPipeError), worker.stdin as pipe:  # one that has died is noticed below
                pipe.write(json.dumps({**request, "worker": number, "num_workers": num_workers}).encode())
        number = 0
        while (block := _receive(workers[number % num_workers])) is not None:
            yield block
            number += 1
        whole = True
    finally:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.close()
            if not whole:
                worker.kill()
        codes = [worker.wait() for worker in workers]
    if any(codes):
        raise ValueError(f"a process that tokenizes {pipeline.source.name} died (exit codes {codes})")


def _request(pipeline: Pipeline) -> dict[str, Any] | None:
    """All that a process needs to prepare records alike, as JSON; None for a chat format that cannot be sent to one."""
    kind = next((name for name, known in _CHATS.items() if type(pipeline.chat) is known), None)
    if kind is None and pipeline.chat is not None:
        logger.warning("this chat format is known to this process only, which tokenizes alone")
        return None
    source = asdict(pipeline.source) | {"files": [str(path) for path in pipeline.source.files]}
    return {
        "config": pipeline.config.settings(),
        "source": source,
        "tokenizer": pipeline.tokenizer.to_json(),
        "chat": None if pipeline.chat is None else [kind, pipeline.chat.to_json()],  # type: ignore[attr-defined]
    }


def _pipeline(request: dict[str, Any]) -> Pipeline:
    """The pipeline that `_request` was made of."""
    source = request["source"]
    source |= {"files": tuple(map(Path, source["files"])), "notes": tuple(source["notes"])}
    tokenizer = Tokenizer.from_json(request["tokenizer"])
    chat = None
    if request["chat"] is not None:
        kind, arguments = request["chat"]
        chat = _CHATS[kind](tokenizer, **arguments)
    return Pipeline(TrainConfig.from_settings(request["config"]), DataSource(**source), tokenizer, chat)


def _receive(worker: subprocess.Popen[bytes]) -> Columns | None:
    assert worker.stdout is not None
    return Columns.receive(worker.stdout)


def _blocks(pipeline: Pipeline, worker: int, num_workers: int) -> Iterator[Columns]:
    records = pipeline.read()
    number = 0
    while block := list(islice(records, BLOCK)):
        if number % num_workers == worker:
            columns = Columns()
            for file, record in block:
                columns.add(pipeline.source.name, pipeline.prepare(record, file))
            yield columns
        number += 1


def main() -> None:
    """The whole life of a worker process: a request from standard input, columns to what was standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends its workers
    code = 1
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # whatever a library prints does not come between the columns
        try:
            request = json.loads(sys.stdin.buffer.read())
            try:
                for columns in _blocks(_pipeline(request), request["worker"], request["num_workers"]):
                    columns.send(pipe)
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                header = json.dumps({"error": str(error)}).encode()
                pipe.write(struct.pack("<Q", len(header)) + header)
                pipe.flush()
            code = 0
        except BrokenPipeError:
            code = 0  # the reader has failed and says so itself
        finally:
            if code == 0:
                os._exit(code)  # without a last flush into a pipe that nobody reads


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise ValueError("a process that tokenizes died in the middle of its work")
    return data
