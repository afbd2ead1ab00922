"""Calibration text. In: a file of any kind and shape that training reads, or none. Out: documents of token ids.

A conversation is one document, written as the model writes conversations. Plain text is laid end to end and cut into pieces of
one length. Without a file a small text in several languages is used, which was written for this purpose (calibration.txt).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from qwenkit.train.data.documents import Document, is_text, read_documents, whole_text
from qwenkit.train.data.files import file_kind
from qwenkit.weights.checkpoint import Checkpoint

DEFAULT = Path(__file__).with_name("calibration.txt")


def calibration_documents(
    checkpoint: Checkpoint, path: Path | None, *, samples: int, length: int, seed: int
) -> list[list[int]]:
    """At most `samples` documents of at most `length` tokens, taken at random with `seed`.

    Raises ValueError, with file and line, for a record that cannot be read, and for a file that holds nothing or less text than
    one sample.
    """
    tokenizer = checkpoint.tokenizer()
    chat = checkpoint.chat()
    chats: list[list[int]] = []
    stream: list[int] = []
    end_of_text = tokenizer.special_tokens.get("<|endoftext|>")
    separator = list(checkpoint.eos_token_ids[:1] if end_of_text is None else [end_of_text])
    shuffled = random.Random(seed)
    documents = list(_documents(path or DEFAULT))
    shuffled.shuffle(documents)
    for document in documents:
        ids = document.encode(tokenizer, chat)
        if document.text is None and (chat is not None or document.ids is not None):
            chats += [ids[:length]] if len(ids) > 1 else []
        else:
            stream += (separator if stream else []) + ids
        if len(chats) >= samples or len(stream) >= 4 * samples * length:
            break
    pieces = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    shuffled.shuffle(pieces)
    found = (chats + pieces)[:samples]
    if not found:
        holds = f"only {len(stream)} tokens, but a sample needs {length}" if stream else "no text"
        raise ValueError(f"{path or DEFAULT} holds {holds}: give a file with more text, or a smaller length")
    return found


def _documents(path: Path) -> Iterator[Document]:
    """The file's documents; blank texts are left out, and the rows of a table of texts are lines of one."""
    if is_text(path):
        text = whole_text(path)
        if text.strip():
            yield Document(str(path), text=text)
        return
    is_table = file_kind(path) in ("parquet", "arrow")
    lines: list[str] = []
    for document in read_documents(path):
        if document.text is None:
            yield document
        elif is_table:  # as wikitext is published: a line a row
            lines.append(document.text if document.text.endswith("\n") else f"{document.text}\n")
        elif document.text.strip():
            yield document
    if any(line.strip() for line in lines):
        yield Document(str(path), text="".join(lines))
