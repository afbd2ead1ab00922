"""Calibration text. In: a file in one of the formats that fine-tuning knows, or none. Out: documents of token ids.

A conversation is one document, written as the model writes conversations. Plain text is laid end to end and cut into pieces of
one length. Without a file a small text in several languages is used, which was written for this purpose (calibration.txt).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenkit.files import has_file
from qwenkit.weights.checkpoint import Checkpoint

DEFAULT = Path(__file__).with_name("calibration.txt")
SUFFIXES = (".json", ".jsonl", ".parquet", ".txt", ".raw", ".tokens", ".md")
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
_TEXT_KEYS = ("text", "content")

Record = str | list[dict[str, str]]  # a plain text, or messages


def calibration_documents(
    checkpoint: Checkpoint, path: Path | None, *, samples: int, length: int, seed: int
) -> list[list[int]]:
    """At most `samples` documents of at most `length` tokens, taken at random with `seed`.

    Raises ValueError for a file that cannot be read, that holds nothing, or less text than one sample.
    """
    tokenizer = checkpoint.tokenizer()
    chat = checkpoint.chat()
    chats: list[list[int]] = []
    stream: list[int] = []
    end_of_text = tokenizer.special_tokens.get("<|endoftext|>")
    separator = list(checkpoint.eos_token_ids[:1] if end_of_text is None else [end_of_text])
    shuffled = random.Random(seed)
    records = list(_records(path or DEFAULT))
    shuffled.shuffle(records)
    for record in records:
        if isinstance(record, list) and chat is not None:
            try:
                ids = chat.render(record, add_generation_prompt=False).ids[:length]
            except ValueError as error:
                raise ValueError(f"{path}: the model's chat template cannot write a conversation: {error}") from None
            if len(ids) > 1:
                chats.append(ids)
        else:
            text = record if isinstance(record, str) else "\n".join(message["content"] for message in record)
            stream += (separator if stream else []) + tokenizer.encode_document(text)
        if len(chats) >= samples or len(stream) >= 4 * samples * length:
            break
    pieces = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    shuffled.shuffle(pieces)
    found = (chats + pieces)[:samples]
    if not found:
        holds = f"only {len(stream)} tokens, but a sample needs {length}" if stream else "no text"
        raise ValueError(f"{path or DEFAULT} holds {holds}: give a file with more text, or a smaller length")
    return found


def _records(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} is no calibration file that is known: allowed are {', '.join(SUFFIXES)}")
    if not has_file(path):
        raise FileNotFoundError(f"{path} does not exist")
    if suffix == ".parquet":
        rows: Any = enumerate(_parquet(path), 1)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start + 1}") from None
        if suffix not in (".json", ".jsonl"):
            if text.strip():
                yield text
            return
        rows = _json_rows(path, text)
    plain: list[str] = []
    for number, row in rows:
        record = _record(row, f"{path}: record {number}")
        if suffix == ".parquet" and isinstance(record, str):
            plain.append(record)  # such files hold one text, a line a row
        elif record:
            yield record
    if any(line.strip() for line in plain):
        yield "".join(line if line.endswith("\n") else line + "\n" for line in plain)


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """A JSON list, or one JSON object a line, whatever the file's name."""
    try:
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
            return
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield number, json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON, a list or an object a line: {error}") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install 'qwenkit[data]', or give .txt") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from None
    return rows


def _record(row: Any, where: str) -> Record:
    """One record: messages, conversations (ShareGPT and Qwen), instruction / input / output (Alpaca), or a text."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
            if key in row:
                return _messages(row, row[key], role, content, f"{where}: {key}")
        if isinstance(row.get("instruction"), str):
            asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
            return _spoken([("system", row.get("system")), ("user", asked), ("assistant", row.get("output"))], where)
        for key in _TEXT_KEYS:
            if isinstance(row.get(key), str):
                return str(row[key])
    raise ValueError(
        f"{where} has none of messages, conversations, instruction, text: found {_summary(row)}, one of them is needed"
    )


def _messages(row: dict[str, Any], turns: Any, role: str, content: str, where: str) -> Record:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where} is no list of objects")
    spoken = [("system", row.get("system"))] if role == "from" else []
    for turn in turns:
        name = turn.get(role, turn.get("role"))
        spoken.append((_ROLES.get(str(name), str(name)), turn.get(content, turn.get("content"))))
    return _spoken(spoken, where)


def _spoken(turns: list[tuple[str, Any]], where: str) -> Record:
    messages = []
    for role, content in turns:
        if role not in ("system", "user", "assistant", "tool"):
            raise ValueError(f"{where}: the role {role!r} is not known, allowed are system, user, assistant, tool")
        if isinstance(content, str) and content:
            messages.append({"role": role, "content": content})
    return messages


def _summary(row: Any) -> str:
    return f"the fields {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
