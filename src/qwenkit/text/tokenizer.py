"""One tokenizer over every vocabulary a Qwen model comes with.

In: a model folder (tokenizer.json, vocab.json + merges.txt, or Qwen-1's qwen.tiktoken) or a GGUF's embedded lists.
Out: text to ids and back. Text is plain unless the caller says otherwise: the characters "<|im_end|>" in a user's
message become the ordinary tokens that spell them, never the control token. Only byte-level BPE is supported.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from qwenkit.text import vocabulary
from qwenkit.text.added_tokens import AddedToken, AddedTokenMatcher
from qwenkit.text.encoder import Encoder
from qwenkit.text.vocabulary import Vocabulary

# The end of a turn, of a text, and what follows the middle in a file or a repository given for fill-in-the-middle.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>")


class TokenLimitError(ValueError):
    """A text has more tokens than the caller wants; it was not tokenized to its end."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(f"text is more than {max_tokens} tokens long, allowed are at most {max_tokens}")
        self.max_tokens = max_tokens


class Tokenizer:
    """Text <-> token ids; made by `from_folder` or `from_bpe`, and safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        added = self._added = tuple(vocabulary.added)
        self._encoder = vocabulary.encoder
        self.prefix = vocabulary.prefix
        """Ids that the files put before every text; `encode_document` does."""
        self.added_tokens = {token.content: token.id for token in added}
        """Tokens found in text before any merging, control tokens included, text -> id."""
        self.special_tokens = {token.content: token.id for token in added if token.special}
        """Control tokens (those a tokenizer.json marks "special"), text -> id."""
        self._special_ids = frozenset(self.special_tokens.values())

        known = dict(vocabulary.ordinary) | {token.id: token.content.encode("utf-8", "replace") for token in added}
        self.vocab_size = len(known)
        """Number of known ids, added tokens included; a model's embedding may have more rows (padding)."""
        self.num_ids = max(known, default=-1) + 1
        """One more than the highest known id."""
        self._bytes = [known.get(id, b"") for id in range(self.num_ids)]

        self._control = AddedTokenMatcher(token for token in added if token.special)
        # Two passes, before and after normalisation, as a tokenizer.json's "normalized" flags ask for.
        self._plain_passes, self._full_passes = (
            tuple(
                AddedTokenMatcher(
                    replace(token, content=self._encoder.normalize(token.content)) if normalized else token
                    for token in added
                    if token.normalized is normalized and (full or not token.special)
                )
                for normalized in (False, True)
            )
            for full in (False, True)
        )

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a model folder: its tokenizer.json; else vocab.json + merges.txt; else qwen.tiktoken.

        Raises FileNotFoundError if the folder has none of them, ValueError naming the file that is corrupt or that
        holds another kind of tokenizer.
        """
        return cls(vocabulary.read_folder(Path(path)))

    @classmethod
    def from_bpe(
        cls,
        tokens: Sequence[str],
        merges: Sequence[str],
        token_types: Sequence[int] | None,
        pre: str,
        prefix: tuple[int, ...] = (),
    ) -> "Tokenizer":
        """The byte-level BPE vocabulary embedded in a GGUF file.

        tokens, merges, token_types and pre are the values of tokenizer.ggml.tokens, .merges, .token_type (1 normal,
        3 control, 4 user-defined, 5 unused; None: tokens written <|like this|> are control tokens) and .pre; prefix are the ids
        that the file puts before every text.
        Raises ValueError for a `pre` that is not known, and for lists that do not fit together.
        """
        return cls(replace(vocabulary.from_gguf_lists(tokens, merges, token_types, pre), prefix=prefix))

    def to_json(self) -> dict[str, Any]:
        """All that another process needs to tokenize alike, as JSON; see `from_json`."""
        added = {token.id for token in self._added}
        ordinary = [[id, token.hex()] for id, token in enumerate(self._bytes) if token and id not in added]
        return {"ordinary": ordinary, "added": [asdict(t) for t in self._added], "encoder": self._encoder.to_json()} | {
            "prefix": list(self.prefix)
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that another process of ours has written with `to_json`; nothing in it is checked again."""
        ordinary = {id: bytes.fromhex(token) for id, token in data["ordinary"]}
        added = [AddedToken(**token) for token in data["added"]]
        return cls(Vocabulary(ordinary, added, Encoder.from_json(data["encoder"]), tuple(data["prefix"])))

    def encode(self, text: str, *, allow_special: bool = False, max_tokens: int | None = None) -> list[int]:
        """Ids of `text`, with nothing added before or after it.

        Control tokens written in the text are spelled out as plain text, or, with allow_special, become their ids.
        Added tokens that are not control tokens (<think>, <tool_call>) become their ids either way. Half a surrogate
        pair becomes U+FFFD. Bytes for which a vocabulary has no token (SmolLM2 lacks some) vanish, as they did when
        the model was trained. Long text is encoded in chunks, between which other threads run.
        Raises TokenLimitError for more than `max_tokens` ids, as soon as there are more, and ValueError for text with half
        a million characters of one kind in a row.
        """
        ids: list[int] = []
        for more in self._encode(text, allow_special):
            ids += more
            if max_tokens is not None and len(ids) > max_tokens:
                raise TokenLimitError(max_tokens)
        return ids

    def encode_document(self, text: str, *, allow_special: bool = False, max_tokens: int | None = None) -> list[int]:
        """Ids of a text that stands alone, a prompt or a document: `encode`, after what the files put before every text.

        Chat templates write their own first token, so what they render is encoded with `encode`. Raises what `encode` does.
        """
        if max_tokens is None:
            return [*self.prefix, *self.encode(text, allow_special=allow_special)]
        try:
            room = max_tokens - len(self.prefix)
            return [*self.prefix, *self.encode(text, allow_special=allow_special, max_tokens=room)]
        except TokenLimitError:
            raise TokenLimitError(max_tokens) from None

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text` in which every added token is spelled out, <think> and <tool_call> too."""
        return list(chain.from_iterable(self._encoder.encode(_well_formed(text))))

    def _encode(self, text: str, allow_special: bool) -> Iterator[list[int]]:
        before, after = self._full_passes if allow_special else self._plain_passes
        for piece in before.split(_well_formed(text)):
            if isinstance(piece, int):
                yield [piece]
            elif after.empty:
                yield from self._encoder.encode(piece)
            else:
                for part in after.split(self._encoder.normalize(piece)):
                    if isinstance(part, int):
                        yield [part]
                    else:
                        yield from self._encoder.encode(part)

    def split_control(self, text: str) -> Iterator[str | int]:
        """Cut `text` at the control tokens written in it: stretches of plain text, and control ids, in order."""
        return self._control.split(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`: their bytes end to end, read as UTF-8, with U+FFFD for what is not UTF-8.

        skip_special leaves control tokens out. Ids beyond the vocabulary (a padded embedding) decode to nothing.
        """
        special = self._special_ids if skip_special else ()
        return b"".join(self.token_bytes(id) for id in ids if id not in special).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for; b"" for an id beyond the vocabulary."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def token_id(self, token: str) -> int | None:
        """The id of the added token, or else of the ordinary token, that reads exactly `token`; None without one."""
        added = self.added_tokens.get(token)
        return self._ordinary_ids.get(token.encode("utf-8", "replace")) if added is None else added

    def end_ids(self) -> tuple[int, ...]:
        """The added tokens that end an answer in every family of Qwen, in the order of `END_TOKENS`.

        Files mark those of fill-in-the-middle as control tokens or as plain added ones.
        """
        return tuple(self.added_tokens[token] for token in END_TOKENS if token in self.added_tokens)

    def is_special(self, id: int) -> bool:
        """Whether `id` is a control token."""
        return id in self._special_ids

    @cached_property
    def _ordinary_ids(self) -> dict[bytes, int]:
        return {token: id for id, token in enumerate(self._bytes) if token}


def _well_formed(text: str) -> str:
    """`text` with each surrogate that stands alone (JSON can carry them) replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
