"""Matcher: where one answer stands in its grammar, and which tokens may come next. Grammars: the compiled ones of a vocabulary.

In: a checked Grammar, and every token that is sampled. Out: a mask over the columns of the logits. The state depends on the
answer's tokens alone, so that preemption and batching do not touch it. Knows no torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenkit.engine.grammar import Grammar, build_vocabulary, compile_grammar, describe_failure
from qwenkit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHE_BYTES = 256 << 20
MIN_SIZE = 256 << 10  # a matcher that was not measured, and what the smallest ones take with their lexer's states


class Grammars:
    """Compiles grammars for one vocabulary and keeps the last ones compiled, up to `max_bytes`. Safe to use from several threads.

    `vocab_size` is the width of the logits; ids without a token (a padded embedding) are never allowed.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int] = (), *, max_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        self.tokenizer, self.vocab_size, self.max_bytes = tokenizer, vocab_size, max_bytes
        self.eos_ids = frozenset(eos_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._known: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._compiled: OrderedDict[Grammar, tuple[LLMatcher, int]] = OrderedDict()
        self._bytes = 0

    def tokens(self) -> list[bytes]:
        """The bytes of every id below vocab_size; b"" where there is no token."""
        return [self.tokenizer.token_bytes(id) for id in range(self.vocab_size)]

    def special_ids(self) -> list[int]:
        """Ids that no text of an answer may become: control tokens, and tags such as <think> and <tool_call>."""
        return sorted(id for id in self.tokenizer.added_tokens.values() if id < self.vocab_size)

    def prepare(self) -> LLTokenizer:
        """Read the vocabulary into llguidance, once: half a second for 150,000 tokens. ValueError without llguidance."""
        with self._lock:
            if self._vocabulary is None:
                tokens = self.tokens()
                self._known = np.array([bool(token) for token in tokens], dtype=np.bool_)
                self._vocabulary = build_vocabulary(tokens, self.special_ids(), self._encode)
            return self._vocabulary

    def compile(self, grammar: Grammar, size: int | None = None) -> LLMatcher:
        """The compiled grammar, which must not be changed: `deep_copy` it. `size` is its memory in bytes, where measured.

        Raises ValueError, one sentence, for a grammar that cannot be used. Other threads run on while llguidance works.
        """
        vocabulary = self.prepare()
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar][0]
        matcher = compile_grammar(grammar, vocabulary)
        size = max(size or 0, MIN_SIZE, 16 * len(grammar.source))
        with self._lock:
            if grammar not in self._compiled and size <= self.max_bytes:
                self._compiled[grammar] = matcher, size
                self._bytes += size
                while self._bytes > self.max_bytes:
                    self._bytes -= self._compiled.popitem(last=False)[1][1]
        return matcher

    def matcher(self, grammar: Grammar, *, stop_ids: frozenset[int], after: int | None = None) -> Matcher:
        """A matcher for one answer, which `stop_ids` end. `after`: the token id that arms it (None: armed at once)."""
        return Matcher(self.compile(grammar).deep_copy(), self._known, self.eos_ids, stop_ids, after)

    def _encode(self, data: bytes) -> list[int]:
        return self.tokenizer.encode_ordinary(data.decode("utf-8", "replace"))


class Matcher:
    """The place of one answer in its grammar. `finished`: nothing but the end can follow; `error`: why it cannot go on."""

    def __init__(
        self,
        matcher: LLMatcher,
        known: NDArray[np.bool_],
        eos_ids: frozenset[int],
        stop_ids: frozenset[int],
        after: int | None,
    ) -> None:
        self._matcher, self._known, self._after = matcher, known, after
        self._eos, self._stops = _ids(eos_ids, known.size), _ids(stop_ids, known.size)
        self.armed = after is None
        self.finished = False
        self.error: str | None = None
        self._continues: NDArray[np.bool_] | None = None  # tokens that the grammar goes on with, once computed
        self._accepts = False

    def allowed(self, barred: frozenset[int] = frozenset()) -> NDArray[np.bool_]:
        """Which token ids may come next, (vocab_size,); all False if none can, and then `error` is set.

        Tokens that end the answer are allowed where the grammar accepts. `barred` (min_tokens) holds as long as something else
        is left. While the grammar is not armed everything is allowed but the model's own end, for then nothing is answered yet.
        """
        if not self.armed:
            allowed = self._known.copy()
            allowed[self._eos] = False
        else:
            if self._continues is None:
                self._compute()
            assert self._continues is not None
            if self.error is not None:
                return np.zeros_like(self._known)
            allowed = self._continues.copy()
            if self._accepts:
                allowed[self._stops] = True
                if not allowed.any():
                    allowed[self._eos] = True  # ignore_eos has nothing to go on with
        if barred:
            rest = allowed.copy()
            rest[_ids(barred, rest.size)] = False
            if rest.any():
                return rest
        if not allowed.any():
            self.error = "grammar cannot be used: no token of the vocabulary goes on from here"
        return allowed

    def advance(self, token: int) -> bool:
        """Take the sampled token; True if it is one that ends the answer and no part of what the grammar describes."""
        if not self.armed:
            self.armed = token == self._after
            return False
        if self._continues is None:
            self._compute()
        assert self._continues is not None
        if self.error is not None:
            return False
        if not self._continues[token]:
            if self._accepts:
                self.finished = True
            else:
                self.error = "grammar was broken by a token that it does not allow"
            return self.finished
        self._continues = None
        self._matcher.consume_token(token)
        self._note_error()
        self.finished = self.error is None and self._matcher.is_stopped()
        return False

    def _compute(self) -> None:
        mask: Any = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(mask, bitorder="little", count=self._known.size + 1).view(np.bool_)
        self._accepts = bool(bits[-1])  # the end, as build_vocabulary numbers it
        self._continues = bits[:-1] & self._known
        self._note_error()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = describe_failure(self._matcher.get_error())


def _ids(ids: Iterable[int], size: int) -> NDArray[np.int64]:
    return np.array(sorted(id for id in ids if id < size), dtype=np.int64)
