"""The preparation tools of MindFormers' qwen1_5: WikiText cleaned and cut, alpaca turned into messages, MindRecord written.

In: wiki.train.tokens, or alpaca_data.json. Out: files with the content that alpaca_converter.py and qwen1_5_preprocess.py wrote.
`clean_wikitext` also serves the data format `wiki`, which trains on such a file without the detour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qwenkit.storage import new_file
from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.data.files import read_records
from qwenkit.train.data.mindrecord import write_mindrecord

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
SYSTEM = "You are a helpful assistant."
IGNORE = -100

# What WikiText's word-by-word form put blanks around, in the order in which it is undone.
_JOINED = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."} | {f" {mark} ": f"{mark} " for mark in ":;.!?,"}
_PAIRS = [(re.escape(left), re.escape(right)) for left, right in ("()", "[]", "{}")] + [('"', '"'), ("'", "'")]
_REST = {
    **{" ".join("=" * n): "=" * n for n in (4, 3, 2)},
    **{f" {chr(176)} ": chr(176), " \n": "\n", "\n ": "\n", " N ": " 1 ", " 's": "'s"},
}


def clean_wikitext(text: str) -> str:
    """WikiText's tokens as a text again: `3 @,@ 000 ( about ) 's` becomes `3,000 (about)'s`."""
    text = text.replace("s '", "s'")
    for spaced, joined in _JOINED.items():
        text = text.replace(spaced, joined)
    for left, right in _PAIRS:
        # The closing mark is one character, written as itself or behind a backslash.
        text = re.sub(rf"({left})\s*([^{right}]*?)\s*({right})", r"\1\2\3", text)
    for spaced, joined in _REST.items():
        text = text.replace(spaced, joined)
    return text


def wiki_chunks(path: Path, tokenizer: Tokenizer, *, seq_length: int, repeat: int = 1) -> Iterator[list[int]]:
    """A WikiText file as chunks of seq_length + 1 ids: paragraphs end to end, without headings and without separators.

    What does not fill the last chunk is left out, as the original tool does. Raises ValueError for a file that is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid UTF-8") from None
    ids: list[int] = []
    for paragraph in clean_wikitext(text).split("\n\n"):
        if paragraph and not paragraph.strip().startswith("="):
            ids += tokenizer.encode(paragraph)
    ids *= repeat
    length = seq_length + 1
    for start in range(0, len(ids) - length + 1, length):
        yield ids[start : start + length]


def alpaca_message(record: dict[str, Any]) -> dict[str, Any]:
    """One entry of alpaca_data.json in the form {"type": "chatml", "messages": [system, user, assistant]}."""
    question = record["instruction"]
    if record.get("input"):
        question = f"{question.removesuffix('.')}: {record['input']}"
    contents = {"system": SYSTEM, "user": question, "assistant": record["output"]}
    messages = [{"role": role, "content": content} for role, content in contents.items()]
    return {"type": "chatml", "messages": messages}


def convert_alpaca(source: Path, target: Path) -> int:
    """alpaca_data.json -> one conversation a line; returns how many. ValueError naming file and line of a bad entry."""
    count = 0
    with new_file(target) as part, part.open("w", encoding="utf-8") as out:
        for record in read_records(source):
            wrong = record.error or _missing(record.value or {}, ("instruction", "output"))
            if wrong or record.value is None:
                raise ValueError(f"{source}:{record.line}: {wrong}")
            out.write(json.dumps(alpaca_message(record.value), ensure_ascii=False) + "\n")
            count += 1
    return count


def wiki_to_mindrecord(
    source: Path, target: Path, tokenizer: Tokenizer, *, seq_length: int, repeat: int = 1, num_partitions: int = 1
) -> int:
    """qwen1_5_preprocess.py --dataset_type wiki: rows of seq_length + 1 `input_ids`. Returns their number."""
    chunks = wiki_chunks(source, tokenizer, seq_length=seq_length, repeat=repeat)
    rows = [{"input_ids": np.array(chunk, np.int32)} for chunk in chunks]
    write_mindrecord(target, rows, {"input_ids": _COLUMN}, num_partitions=num_partitions)
    return len(rows)


def messages_to_mindrecord(
    source: Path, target: Path, tokenizer: Tokenizer, *, seq_length: int, num_partitions: int = 1
) -> int:
    """qwen1_5_preprocess.py --dataset_type qa: ChatML of each conversation, padded or cut to seq_length + 1.

    Columns input_ids, target_ids (padding is -100, all else is learned) and attention_mask. Returns the number of rows.
    """
    chat = JinjaChat(tokenizer, CHATML)
    length, pad = seq_length + 1, tokenizer.special_tokens["<|endoftext|>"]
    rows = []
    for record in read_records(source):
        wrong = record.error or _missing(record.value or {}, ("messages",))
        if wrong or record.value is None:
            raise ValueError(f"{source}:{record.line}: {wrong}")
        try:
            ids = chat.render(record.value["messages"], add_generation_prompt=False).ids[:length]
        except ValueError as error:
            raise ValueError(f"{source}:{record.line}: {error}") from None
        filled = np.full(length, pad, np.int32)
        filled[: len(ids)] = ids
        mask = filled != pad
        rows.append(
            {
                "input_ids": filled,
                "target_ids": np.where(mask, filled, IGNORE).astype(np.int32),
                "attention_mask": mask.astype(np.int32),
            }
        )
    columns = dict.fromkeys(("input_ids", "target_ids", "attention_mask"), _COLUMN)
    write_mindrecord(target, rows, columns, num_partitions=num_partitions)
    return len(rows)


_COLUMN = {"type": "int32", "shape": [-1]}


def _missing(record: dict[str, Any], fields: tuple[str, ...]) -> str | None:
    return next((f"the field {field} is missing" for field in fields if field not in record), None)
