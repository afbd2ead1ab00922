"""Tokenized data on disk: memory-mapped, named by the hash of everything that decides its content, never half-written.

In: a Pipeline, and the folder of the cache. Out: a `Store`, from which single items are read without loading the rest. The name
covers the bytes of the source files, tokenizer, chat format and settings, so that a change of any of them is another store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qwenkit.storage import cache_folder, install, locked
from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Pair, Sample
from qwenkit.train.config import TrainConfig
from qwenkit.train.data.pipeline import DataError, Pipeline, Report
from qwenkit.train.data.registry import DataSource
from qwenkit.train.data.render import Item
from qwenkit.train.data.workers import TYPES, Columns, blocks

VERSION = 2  # of the files' layout and of the rules by which records are read and rendered
# Settings that decide what a record becomes; those of shuffling, packing and the run do not.
_SETTINGS = (
    *("stage", "system", "variables", "cutoff_len", "max_samples", "labels", "train_on_prompt", "mask_history"),
    *("overlong", "bad_samples", "enable_thinking", "split_special_tokens"),
)
_PROBE = "Ünïcode 你好，世界 123 4567 don't\n\n  \t👩‍👩‍👧 e\u0301 def f(x):\n    return x ** 2 <think> <tool_call> <|im_end|> "


def fingerprint(tokenizer: Tokenizer, chat: ChatFormat | None) -> str:
    """A hash of what turns conversations into ids: every token's bytes, how a probe is cut, the chat format's text."""
    digest = hashlib.sha256()
    for id in range(tokenizer.num_ids):
        token = tokenizer.token_bytes(id)
        digest.update(len(token).to_bytes(4, "little") + token)
    digest.update(json.dumps([tokenizer.added_tokens, tokenizer.special_tokens, tokenizer.encode(_PROBE)]).encode())
    if chat is not None:
        digest.update(f"{type(chat).__name__}\0{getattr(chat, 'source', '')}".encode())
        probes: list[list[dict[str, Any]]] = [
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}],
            [{"role": "system", "content": "d"}, {"role": "user", "content": "e"}],
        ]
        for probe in probes:
            try:
                digest.update(
                    json.dumps(chat.render(probe, add_generation_prompt=probe[-1]["role"] == "user").ids).encode()
                )
            except ValueError as error:  # a format without system messages, say
                digest.update(str(error).encode())
    return digest.hexdigest()


def config_key(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a record becomes, and the version of the rules."""
    chunks = config.stage == "pt" and config.packs  # no text is too long then
    return {"version": VERSION, "chunks": chunks, **{name: getattr(config, name) for name in _SETTINGS}}


def store_key(config: TrainConfig, source: DataSource, ids_hash: str) -> str:
    """The name of a source's store. Reads every byte of its files."""
    digest = hashlib.sha256()
    digest.update(json.dumps([ids_hash, config_key(config), source.settings], sort_keys=True).encode())
    for path in source.files:
        with path.open("rb") as file:
            inner = hashlib.sha256()
            while data := file.read(1 << 20):
                inner.update(data)
        digest.update(path.name.encode() + b"\0" + inner.digest())  # the name is part of what messages say
    return digest.hexdigest()[:32]


class Store:
    """The items of one source, in the order of its files.

    lengths (n,): tokens of each item, both answers of a pair together. records (n,): the number of the record it came from;
    num_records of them gave something. Items are read by `item`.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        self.folder = folder
        self.key: str = manifest["key"]
        self.report = Report.from_json(manifest["report"])
        self._files: list[str] = manifest["files"]
        self._arrays = {}
        for name, code in TYPES.items():
            path, dtype = folder / f"{name}.bin", np.dtype(code)
            if path.stat().st_size != manifest["sizes"][name] * dtype.itemsize:
                raise ValueError(f"{path} has another size than its manifest says; delete the folder to tokenize anew")
            empty = manifest["sizes"][name] == 0
            self._arrays[name] = np.empty(0, dtype) if empty else np.memmap(path, dtype, mode="r")
        starts, units = self._arrays["starts"], self._arrays["units"]
        self.lengths = np.diff(starts[units])
        self.records = self._arrays["records"]
        self.num_records = int(self.records[-1]) + 1 if len(self.records) else 0

    def __len__(self) -> int:
        return len(self.lengths)

    def item(self, index: int, start: int = 0, stop: int | None = None) -> Item:
        """Item number `index`, or tokens start to stop of its only document."""
        first, last = (int(unit) for unit in self._arrays["units"][index : index + 2])
        documents = [self._document(document, start, stop) for document in range(first, last)]
        liked = int(self._arrays["liked"][index])
        if liked == 2:
            return documents[0]
        return Pair(documents[0], documents[1] if len(documents) > 1 else None, bool(liked))

    def _document(self, document: int, start: int, stop: int | None) -> Sample:
        begin, end = (int(place) for place in self._arrays["starts"][document : document + 2])
        end = end if stop is None else min(end, begin + stop)
        begin += start
        ids, learned = self._arrays["ids"][begin:end], self._arrays["learned"][begin:end]
        origin = f"{self._files[self._arrays['files'][document]]}:{self._arrays['lines'][document]}"
        return Sample(ids.tolist(), np.where(learned, ids, IGNORE).tolist(), origin)


def open_store(
    config: TrainConfig, source: DataSource, tokenizer: Tokenizer, chat: ChatFormat | None, ids_hash: str | None = None
) -> Store:
    """The source's store: the one on disk where it fits, else made now, while other processes that want it wait.

    Raises DataError, after everything was read, where a policy is `error` and records are wrong; ValueError for settings that
    do not go together; OSError where the cache cannot be written.
    """
    cache = Path(config.cache_dir) if config.cache_dir else cache_folder() / "tokenized"
    key = store_key(config, source, ids_hash or fingerprint(tokenizer, chat))
    folder = cache / key
    pipeline = Pipeline(config, source, tokenizer, chat)
    cache.mkdir(parents=True, exist_ok=True)
    asked_at = time.time()
    with locked(cache / f"{key}.lock"):
        if _is_ready(folder) and (not config.overwrite_cache or _made_while_waiting(folder, asked_at)):
            return Store(folder)
        _build(pipeline, folder, key, config.preprocessing_num_workers)
    return Store(folder)


def _build(pipeline: Pipeline, folder: Path, key: str, workers: int) -> None:
    part = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
    try:
        report, sizes = Report(), dict.fromkeys(TYPES, 0)
        columns = Columns()
        for block in blocks(pipeline, workers):
            report.merge(block.report)
            if report.num_errors:
                continue  # the report shall be whole, the data will not be used
            columns.extend(block)
            if columns.num_waiting > 1 << 20:
                columns.flush(part, sizes)
        if report.num_errors:
            raise DataError(report)
        columns.flush(part, sizes)
        files = [path.name for path in pipeline.source.files]
        manifest = {
            "key": key,
            "version": VERSION,
            "files": files,
            "sizes": sizes,
            "report": report.to_json(),
            "made_at": time.time(),
        }
        (part / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
        install([(part, folder)])
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_ready(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _made_while_waiting(folder: Path, asked_at: float) -> bool:
    """With overwrite_cache, the first of several processes makes the store anew and the others take what it made."""
    made_at: float = json.loads((folder / "manifest.json").read_text("utf-8"))["made_at"]
    return asked_at <= made_at <= time.time()
