"""Engine: requests go in with `add`, every `step` computes one batch and tells what it added, `abort` takes a request out.

One step: the scheduler says who runs, the runner computes, the sampler chooses, and here tokens are appended, answers ended and
blocks given back. It runs in one thread and knows nothing of who waits for the answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from pathlib import Path

import numpy as np
import torch

from qwenkit.engine.blocks import BlockPool
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.isolation import compute_apart
from qwenkit.engine.matcher import Grammars
from qwenkit.engine.request import Delta, Sequence
from qwenkit.engine.runner import Runner
from qwenkit.engine.sampler import Sampled, describe, sample
from qwenkit.engine.sampling import SamplingParams
from qwenkit.engine.scheduler import Row, Scheduler
from qwenkit.model.rope import ntk_alpha
from qwenkit.text.stream import Detokenizer, StopStrings
from qwenkit.text.tokenizer import Tokenizer

log = logging.getLogger("qwenkit.engine")

LOGIT_ROWS = 256  # rows of a prompt that meet the vocabulary at once when their log-probabilities are asked for


class Engine:
    """`max_model_len` tokens must fit the runner's cache; `eos_ids` end an answer unless a request ignores them."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        max_model_len: int,
        eos_ids: AbstractSequence[int],
        defaults: SamplingParams,
    ) -> None:
        assert runner.block_size == config.block_size
        assert runner.num_blocks * runner.block_size >= max_model_len
        self.runner = runner
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.eos_ids = frozenset(eos_ids)
        self.defaults = defaults
        self.grammars = Grammars(tokenizer, runner.model.config.vocab_size, eos_ids)
        self.pool = BlockPool(runner.num_blocks)
        self.scheduler = Scheduler(config, self.pool)
        self._seeds = np.random.default_rng(config.seed)
        self._live: dict[int, list[Sequence]] = {}
        self._next_id = 0
        self.num_corrupted = 0  # answers ended because their logits were not finite
        self.num_failed = 0  # answers ended because computing them raised
        self.healthy = True  # False once a step raised and not even one token could be computed, until a step succeeds

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(
        self,
        prompt: AbstractSequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        principal: str = "",
        cache_namespace: str = "",
    ) -> int:
        """Queue a prompt of token ids; returns the request's id.

        `adapter` names a loaded one. A higher `priority` runs first, a lower one is preempted first. Within a priority each
        `principal` gets an equal share of the engine, however many requests it has. Only requests of one `cache_namespace` share
        a prefix.
        Raises ValueError for an empty prompt, one that leaves no room for an answer, a token id outside the vocabulary, an
        adapter that is not loaded, or a grammar that cannot be used.
        """
        params = (params or SamplingParams()).with_defaults(self.defaults)
        self.check_prompt(prompt)
        self._check_ids("logit_bias", params.logit_bias)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        adapter_key = None if adapter is None else self.runner.adapters.key(adapter)
        if params.grammar is not None:
            self.grammars.compile(params.grammar)
        request_id = self._next_id
        self._next_id += 1
        seed = int(self._seeds.integers(2**63)) if params.seed is None else params.seed
        sequences = [self._sequence(request_id, index, prompt, params, seed) for index in range(params.n)]
        for sequence in sequences:
            sequence.priority, sequence.principal = priority, principal
            sequence.cache_namespace, sequence.adapter = cache_namespace, adapter_key
        sequences[0].followers = sequences[1:]
        self._live[request_id] = sequences
        self.scheduler.add(sequences[0])
        return request_id

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self.runner.adapters.names

    def load_adapter(self, name: str, path: Path | str) -> None:
        """Read a LoRA adapter (a folder as peft writes it); requests may then name it. Raises what `Adapters.load` raises."""
        self.runner.adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. ValueError for an unknown one, or while requests use it."""
        key = self.runner.adapters.key(name)
        users = sum(any(sequence.adapter == key for sequence in sequences) for sequences in self._live.values())
        if users:
            raise ValueError(f"adapter {name!r} is in use by {users} requests; unload it when they have ended")
        self.runner.adapters.unload(name)

    def check_prompt(self, prompt: AbstractSequence[int]) -> None:
        """Raise the ValueError that `add` would raise for this prompt."""
        if not prompt:
            raise ValueError("prompt is empty, at least one token is needed")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"prompt is {len(prompt)} tokens long, but the context for prompt and answer is {self.max_model_len} tokens"
            )
        self._check_ids("prompt", prompt)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        vocab_size = self.runner.model.config.vocab_size
        wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name} has token id {wrong}, allowed are 0 to {vocab_size - 1}")

    def abort(self, request_id: int) -> None:
        """Take a request out, whatever it is doing; its blocks are free at once. Unknown or finished ids are ignored."""
        for sequence in self._live.pop(request_id, ()):
            self.scheduler.remove(sequence)

    def end(self, request_id: int) -> list[Delta]:
        """End what is left of a request as if its answers had come to their longest; their last Deltas, which have no token."""
        sequences = self._live.pop(request_id, [])
        for sequence in sequences:
            self.scheduler.remove(sequence)
        return [
            Delta(
                one.request_id, one.index, (), one.rest_of_text(), finish_reason="length", admitted_at=one.admitted_at
            )
            for one in sequences
        ]

    def reset(self) -> None:
        """Drop every request and the prefix cache, whatever state an error has left them in."""
        self._live.clear()
        self.scheduler.reset()
        self.pool.reset()

    def step(self) -> list[Delta]:
        """Compute one batch and say what it added to each answer."""
        rows = self.scheduler.schedule()
        if not rows:
            return []
        deltas: list[Delta] = []
        for row, choice in compute_apart(self._compute, rows, self._works):
            if isinstance(choice, Exception):
                self.num_failed += 1
                deltas += self._fail(row.sequence, "the engine could not compute this request")
            elif choice is not None and row.sequence.matcher is not None and row.sequence.matcher.error is not None:
                deltas += self._fail(row.sequence, row.sequence.matcher.error, field="grammar")
            elif choice is not None and choice.token_id < 0:
                self.num_corrupted += 1
                self.pool.forget(row.sequence.block_table)
                deltas += self._fail(row.sequence, "the model gave no usable next token: its logits are not finite")
            else:
                self.healthy = True
                samples = row.samples
                self.scheduler.computed(row)
                if samples:
                    assert choice is not None
                    deltas += self._accept(row.sequence, choice)
        return deltas

    def _works(self) -> bool:
        """Whether the model computes one token, by itself in the runner's spare block."""
        sequence = self._sequence(-1, 0, [0], SamplingParams(max_tokens=1).with_defaults(self.defaults), 0)
        sequence.block_table = [self.pool.num_blocks]
        try:
            self._compute([Row(sequence, 1)])
            self.healthy = True
        except Exception:
            self.healthy = False
        return self.healthy

    def _compute(self, rows: list[Row]) -> list[Sampled | None]:
        """The next token of each row that samples. Changes nothing that would stand in the way of doing it again."""
        computed = self.runner.run(rows)
        if computed.tokens is not None:
            return [Sampled(token, None) for token in computed.tokens]
        if computed.hidden is not None:
            for row, hidden in zip(rows, computed.hidden.split([row.num_tokens for row in rows]), strict=True):
                if row.sequence.prompt_logprobs is not None:
                    self._prompt_logprobs(row, hidden)
        sampling = [row.sequence for row in rows if row.samples]
        sampled = iter(sample(computed.logits, sampling) if sampling else [])
        return [next(sampled) if row.samples else None for row in rows]

    def _accept(self, sequence: Sequence, choice: Sampled) -> list[Delta]:
        try:
            return [self._append(sequence, choice)]
        except Exception:
            log.exception("a token could not be added to request %d", sequence.request_id)
            self.num_failed += 1
            return self._fail(sequence, "the engine could not add a token to this answer")

    def _fail(self, sequence: Sequence, error: str, field: str | None = None) -> list[Delta]:
        """End an answer, and those of its request that wait for it to begin, with an error of the engine or of a `field`."""
        ended = [sequence, *sequence.followers]
        for one in ended:
            self._finish(one)
        return [
            Delta(one.request_id, one.index, (), "", finish_reason="error", error=error, error_field=field)
            for one in ended
        ]

    def check(self) -> None:
        """Assert that no block is lost and nothing is remembered that nobody waits for. Looks at every block: for tests."""
        self.scheduler.check()
        if not self.has_work:
            self.check_idle()

    def check_idle(self) -> None:
        """Assert, by counts alone, that an engine without work holds nothing."""
        assert not self.has_work, "there is work"
        held = self.pool.num_blocks - self.pool.num_free
        assert not held, f"{held} blocks are held by nobody"
        assert not self._live, f"{len(self._live)} requests are remembered that are over"

    def _sequence(
        self, request_id: int, index: int, prompt: AbstractSequence[int], params: SamplingParams, seed: int
    ) -> Sequence:
        room = self.max_model_len - len(prompt)
        trained = self.runner.model.config.rope.dynamic_ntk_length
        wants_prompt = params.prompt_logprobs is not None and index == 0
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_ids)
        return Sequence(
            request_id=request_id,
            index=index,
            tokens=list(prompt),
            num_prompt=len(prompt),
            params=params,
            seed=seed,
            max_tokens=min(params.max_tokens or room, room),
            stop_ids=stop_ids,
            detokenizer=Detokenizer(self.tokenizer, skip_special=params.skip_special_tokens),
            stop_strings=StopStrings(params.stop, self.tokenizer if params.skip_special_tokens else None)
            if params.stop
            else None,
            rope_alpha=None if trained is None else float(ntk_alpha(len(prompt), trained)),
            prompt_logprobs=[None] if wants_prompt else None,
            matcher=None
            if params.grammar is None
            else self.grammars.matcher(params.grammar, stop_ids=stop_ids, after=params.grammar_after),
        )

    def _prompt_logprobs(self, row: Row, hidden: torch.Tensor) -> None:
        """Add what the hidden states (num_tokens, hidden_size) of a prompt's chunk say of the token after each."""
        sequence = row.sequence
        known = sequence.prompt_logprobs
        assert known is not None
        start = sequence.num_computed
        stop = min(start + row.num_tokens, sequence.num_prompt - 1)
        begin = max(start, len(known) - 1)  # after a preemption some are known already
        for first in range(begin, stop, LOGIT_ROWS):
            places = range(first, min(first + LOGIT_ROWS, stop))
            some = hidden[places.start - start : places.stop - start]
            logprobs = self.runner.logits(some, sequence.adapter).log_softmax(-1)
            for place, values in zip(places, logprobs, strict=True):
                known.append(describe(values, sequence.tokens[place + 1], sequence.params.prompt_logprobs or 0))

    def _append(self, sequence: Sequence, choice: Sampled) -> Delta:
        """Add a sampled token to its answer, and end the answer if it ends here."""
        first = sequence.num_output == 0
        token, params = choice.token_id, sequence.params
        sequence.tokens.append(token)
        finish_reason: str | None = None
        stop_reason: int | str | None = None
        text = ""
        matcher = sequence.matcher
        if (token in sequence.stop_ids and sequence.num_output > params.min_tokens) or (
            matcher is not None and matcher.advance(token)
        ):
            finish_reason = "stop"
            stop_reason = token if token in params.stop_token_ids else None
        else:
            text = sequence.detokenizer.push([token])
            if sequence.num_output >= sequence.max_tokens:
                finish_reason = "length"
            if matcher is not None and matcher.finished:
                finish_reason = "stop"  # nothing but the end could follow
        if finish_reason is not None:
            text += sequence.detokenizer.finish()
        if sequence.stop_strings is not None and sequence.num_output > params.min_tokens:
            text, matched = sequence.stop_strings.push(text, token)
            if matched is not None:
                finish_reason, stop_reason = "stop", matched
            elif finish_reason is not None:
                text += sequence.stop_strings.flush()
        delta = Delta(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=(token,),
            text=text,
            logprobs=None if choice.logprob is None else (choice.logprob,),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first and sequence.prompt_logprobs is not None else None,
            num_cached_tokens=sequence.num_cached,
            admitted_at=sequence.admitted_at,
        )
        if first:
            for follower in sequence.followers:
                self.scheduler.add(follower)
            sequence.followers = []
        if finish_reason is not None:
            self._finish(sequence)
        return delta

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        live = self._live[sequence.request_id]
        live.remove(sequence)
        if not live:
            del self._live[sequence.request_id]
