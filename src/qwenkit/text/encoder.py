"""The guarded entry to the tokenizer libraries: plain text to ids, in chunks, with every failure as a ValueError.

In: text of any length. Out: the ids that the library gives for the whole, computed from chunks that end where the pre-tokenizer
ends a word whatever stands before and after. A long text therefore neither exceeds the limits of the libraries' regex engines
(whose panics are BaseExceptions) nor holds the interpreter's lock for long.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import tiktoken
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

_T = TypeVar("_T")

CHUNK = 16_384  # characters: a few milliseconds
MAX_STRETCH = 500_000  # characters without a place to cut; the regex engines give up at a million of one kind
MAX_WHOLE = 4_000_000  # characters of a text for a tokenizer whose words are cut in a way that is not known here

# Letters whose category and normalization no version of Unicode changes, and characters that end a word of letters or digits.
# None of either composes with what stands before it.
_LETTERS = r"A-Za-z\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_MARKS = r"\t-\r -/:-@\[-`{-~\u2014\u2018\u2019\u201c\u201d\u2026\u3000-\u3002\u3008-\u3011"
_MARKS += r"\uff01\uff08\uff09\uff0c\uff1a\uff1b\uff1f"
_PAIRS = (
    r"[^\s\u180e] ",  # what is no blank, and a blank: a blank begins a word or is one
    rf"[{_LETTERS}][{_MARKS}0-9]",
    rf"[0-9][{_MARKS}{_LETTERS}]",
)


class Cuts:
    """Where a text may be cut before it is normalized (NFC or not at all) and pre-tokenized.

    A cut is between two characters that never belong to one word, the first of which is no blank: what a blank becomes depends on
    what follows it. This holds for the patterns of GPT-2, Llama 3 and Qwen; `digits`: each digit is a word of its own;
    `lines`: blanks up to the last line break are a word of their own, whatever follows.
    """

    def __init__(self, *, digits: bool = False, lines: bool = False) -> None:
        self._digits, self._lines = digits, lines
        pairs = [*_PAIRS]
        if digits:
            pairs.append(r"[0-9][0-9]")
        if lines:
            pairs.append(r"\n[!-~]")
        self._pair = re.compile("|".join(pairs))

    def to_json(self) -> dict[str, Any]:
        """Arguments that make the same cuts."""
        return {"digits": self._digits, "lines": self._lines}

    def chunks(self, text: str, size: int) -> Iterator[str]:
        """Pieces of `text`, which end at the first cut after half of `size` characters; longer ones where there is none."""
        start = 0
        while len(text) - start > size:
            pair = self._pair.search(text, start + size // 2)
            if pair is None:
                break
            yield text[start : pair.start() + 1]
            start = pair.start() + 1
        if start < len(text):
            yield text[start:] if start else text


class Engine(Protocol):
    """Byte-pair encoding of plain text; knows no added tokens. Raises what its library raises."""

    def normalize(self, text: str) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def to_json(self) -> dict[str, Any]: ...


class ByteLevelEngine:
    """The `tokenizers` library, with normalizer, pre-tokenizer and merges but without added tokens."""

    def __init__(
        self,
        model: models.BPE,
        normalizer: normalizers.Normalizer | None,
        pre_tokenizer: pre_tokenizers.PreTokenizer,
    ) -> None:
        self._tokenizer = Tokenizer(model)
        self._normalizer = normalizer
        if normalizer is not None:
            self._tokenizer.normalizer = normalizer
        self._tokenizer.pre_tokenizer = pre_tokenizer

    def normalize(self, text: str) -> str:
        return text if self._normalizer is None else self._normalizer.normalize_str(text)

    def encode(self, text: str) -> list[int]:
        if len(text) > 2 * CHUNK:  # only a batch lets other threads run meanwhile
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def to_json(self) -> dict[str, Any]:
        return {"tokenizers": self._tokenizer.to_str()}


class TiktokenEngine:
    """The `tiktoken` library over Qwen-1's ranks."""

    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        self._ranks, self._pattern = ranks, pattern
        self._encoding = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(self.normalize(text))

    def to_json(self) -> dict[str, Any]:
        return {"ranks": [[token.hex(), rank] for token, rank in self._ranks.items()], "pattern": self._pattern}


class Encoder:
    """An engine behind its guard. `cuts` None: it is not known where text may be cut, and it goes in whole.

    max_whole: characters of the longest text that goes in whole.
    """

    def __init__(self, engine: Engine, cuts: Cuts | None, *, chunk: int = CHUNK, max_whole: int = MAX_WHOLE) -> None:
        self._engine, self._cuts, self._chunk = engine, cuts, chunk
        self._max_whole = max_whole if cuts is None else MAX_STRETCH

    def to_json(self) -> dict[str, Any]:
        """All that another process needs to encode alike, as JSON; see `from_json`."""
        cuts = None if self._cuts is None else self._cuts.to_json()
        return {"engine": self._engine.to_json(), "cuts": cuts, "chunk": self._chunk, "max_whole": self._max_whole}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Encoder":
        """The encoder that another process of ours has written with `to_json`."""
        engine: Engine
        if "ranks" in data["engine"]:
            ranks = {bytes.fromhex(token): rank for token, rank in data["engine"]["ranks"]}
            engine = TiktokenEngine(ranks, data["engine"]["pattern"])
        else:
            whole = Tokenizer.from_str(data["engine"]["tokenizers"])
            assert isinstance(whole.model, models.BPE)
            assert whole.pre_tokenizer is not None
            engine = ByteLevelEngine(whole.model, whole.normalizer, whole.pre_tokenizer)
        cuts = None if data["cuts"] is None else Cuts(**data["cuts"])
        return cls(engine, cuts, chunk=data["chunk"], max_whole=data["max_whole"])

    def normalize(self, text: str) -> str:
        """Raises ValueError for what the library cannot do."""
        normalize = self._engine.normalize
        return "".join(guarded(partial(normalize, chunk), "text cannot be normalized") for chunk in self._chunks(text))

    def encode(self, text: str) -> Iterator[list[int]]:
        """The ids of each chunk in turn. Raises ValueError for a text that is too long to go in whole."""
        for chunk in self._chunks(text):
            yield guarded(partial(self._engine.encode, chunk), "text cannot be tokenized")

    def _chunks(self, text: str) -> Iterator[str]:
        if len(text) <= self._chunk:
            yield text
            return
        for chunk in [text] if self._cuts is None else self._cuts.chunks(text, self._chunk):
            if len(chunk) > self._max_whole:
                raise ValueError(
                    f"text has {len(chunk)} characters in a row that the tokenizer takes as one, "
                    f"allowed are at most {self._max_whole}"
                )
            yield chunk


def guarded(call: Callable[[], _T], what: str) -> _T:
    """The call's result. Raises ValueError, one sentence that begins with `what`, for what a Rust library raises.

    Its panics are no Exceptions, so that `except Exception` lets them pass; here they are known by their type's name.
    """
    try:
        return call()
    except Exception as error:
        raise ValueError(f"{what}: {_first_line(error)}") from error
    except BaseException as error:
        if is_panic(error):
            raise ValueError(f"{what}: {_first_line(error)}") from None
        raise


def is_panic(error: BaseException) -> bool:
    """True for the exception that pyo3, through which Python calls Rust, makes of a panic."""
    return type(error).__module__ == "pyo3_runtime" and type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__
