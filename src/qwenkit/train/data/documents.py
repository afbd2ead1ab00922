"""Documents of a data file for whoever only reads it: calibration and evaluation see what training sees.

In: a file of any kind and shape that training reads. Out: texts, conversations or token ids, in order. A record that cannot be
read raises ValueError with the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenkit.files import open_file
from qwenkit.text.chat import ChatFormat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.data.fields import BadRecordError, Message
from qwenkit.train.data.files import KINDS, file_kind, read_records
from qwenkit.train.data.formats import RecordReader
from qwenkit.train.data.registry import DataSource
from qwenkit.train.data.shapes import recognise

TEXT_SUFFIXES = (*(suffix for suffix, kind in KINDS.items() if kind == "text"), ".md")


@dataclass(frozen=True)
class Document:
    """One record: a text, a conversation with its tools, or ready ids. `where` is its file and line."""

    where: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    ids: tuple[int, ...] | None = None

    def encode(self, tokenizer: Tokenizer, chat: ChatFormat | None) -> list[int]:
        """Ids of the document; a conversation as the model's chat format writes it, or its contents where it has none.

        Raises ValueError where the format refuses it.
        """
        if self.ids is not None:
            return list(self.ids)
        if self.text is not None:
            return tokenizer.encode_document(self.text)
        if chat is None:
            return tokenizer.encode_document("\n".join(message["content"] for message in self.messages))
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in self.messages]
        try:
            return chat.render(plain, tools=self.tools, add_generation_prompt=False).ids
        except ValueError as error:
            raise ValueError(
                f"{self.where}: the model's chat template cannot write this conversation: {error}"
            ) from None


def is_text(path: Path) -> bool:
    """True for a file that is one text, not records. ValueError for a name that is no data file's."""
    if path.suffix.lower() in TEXT_SUFFIXES:
        return True
    file_kind(path)  # raises
    return False


def whole_text(path: Path) -> str:
    """The text of a file of any size. ValueError naming the byte where it is not UTF-8; see `open_file` for what else."""
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start + 1}") from None


def read_documents(path: Path) -> Iterator[Document]:
    """The records of a file, texts and conversations of every shape that training recognises; empty ones are passed over.

    Raises FileNotFoundError, and ValueError naming file and line for a record that training cannot read.
    """
    kind = file_kind(path)
    readers = {
        stage: RecordReader(DataSource(path.name, ()), stage, system=None, variables={}) for stage in ("sft", "dpo")
    }
    for record in read_records(path, texts=True):
        where = f"{path}:{record.line}"
        if record.value is None:
            raise ValueError(f"{where}: {record.error}")
        try:
            yield _document(record.value, kind, readers, where)
        except BadRecordError as error:
            if not error.kind.startswith("empty"):
                raise ValueError(f"{where}: {error}") from None


def _document(value: dict[str, Any], kind: str, readers: dict[str, RecordReader], where: str) -> Document:
    if recognise(value, "sft")[0] == "text":
        if not isinstance(value["text"], str):
            raise BadRecordError("wrong type", f"text is {value['text']!r:.60}, allowed is a text")
        return Document(where, text=value["text"])
    pairs = value.get("chosen") is not None and value.get("rejected") is not None
    example = readers["dpo" if pairs else "sft"].read(value, kind)
    if example.ids is not None:
        return Document(where, ids=tuple(example.ids))
    answer = () if example.chosen is None else (example.chosen,)
    return Document(where, messages=(*example.messages, *answer), tools=example.tools)
