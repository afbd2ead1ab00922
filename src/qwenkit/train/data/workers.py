"""Tokenizing by several processes: blocks of records become columns of numbers, in the order of the files.

In: a Pipeline and the number of processes. Out: `Columns`, one for each block. Worker processes are forks that read everything,
prepare every n-th block and send its columns through a pipe as JSON and plain numbers; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from qwenkit.train.batch import IGNORE, Sample
from qwenkit.train.data.pipeline import Pipeline, Prepared, Report
from qwenkit.train.data.render import samples_of

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

    def send(self, pipe: BinaryIO) -> None:
        counts = [self._tokens, self._documents, self._records]
        lengths = [len(values) for values in self._arrays.values()]
        header = json.dumps({"counts": counts, "lengths": lengths, "report": self.report.to_json()}).encode()
        pipe.write(struct.pack("<Q", len(header)) + header)
        for values in self._arrays.values():
            pipe.write(values.tobytes())
        pipe.flush()

    @classmethod
    def receive(cls, pipe: BinaryIO) -> Columns | None:
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
    """The source's records in blocks, in order. Raises ValueError where a file is damaged as a whole or a worker dies."""
    if num_workers == 1:
        yield from _blocks(pipeline, 0, 1)
        return
    if not hasattr(os, "fork"):
        raise ValueError(f"preprocessing_num_workers is {num_workers}, this system allows 1")
    pipes: list[BinaryIO] = []
    children: list[int] = []
    try:
        for worker in range(num_workers):
            read_end, write_end = os.pipe()
            with warnings.catch_warnings():
                # A child only reads files, renders and writes to its pipe: no lock of another thread is taken.
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                _work(pipeline, worker, num_workers, write_end, [read_end, *(pipe.fileno() for pipe in pipes)])
            os.close(write_end)
            children.append(child)
            pipes.append(os.fdopen(read_end, "rb"))
        number = 0
        while (block := Columns.receive(pipes[number % num_workers])) is not None:
            yield block
            number += 1
    finally:
        for pipe in pipes:
            pipe.close()  # a child that still writes sees that nobody reads, and ends
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise ValueError(f"a process that tokenizes {pipeline.source.name} died (exit codes {codes})")


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


def _work(pipeline: Pipeline, worker: int, num_workers: int, write_end: int, others: list[int]) -> None:
    """The whole life of a worker process; never returns."""
    code = 1
    try:
        for other in others:
            os.close(other)
        with os.fdopen(write_end, "wb") as pipe:
            try:
                for columns in _blocks(pipeline, worker, num_workers):
                    columns.send(pipe)
            except (ValueError, OSError) as error:
                if not isinstance(error, BrokenPipeError):
                    header = json.dumps({"error": str(error)}).encode()
                    pipe.write(struct.pack("<Q", len(header)) + header)
        code = 0
    except BrokenPipeError:
        code = 0  # the reader has failed and says so itself
    finally:
        os._exit(code)


def _exactly(pipe: BinaryIO, count: int) -> bytes:
    data = pipe.read(count)
    if len(data) != count:
        raise ValueError("a process that tokenizes died in the middle of its work")
    return data
