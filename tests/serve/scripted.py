"""An engine without a model: it answers with given texts or token ids, one token a step, through Engine's interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwenkit.engine.request import Delta, TokenLogprob
from qwenkit.engine.sampling import SamplingParams
from qwenkit.text.stream import Detokenizer, StopStrings
from qwenkit.text.tokenizer import Tokenizer

Script = str | Sequence[int]
Scripts = Iterable[Script] | Callable[[list[int], SamplingParams], Script]


@dataclass
class Asked:
    """What a request came with, for tests to look at."""

    prompt: list[int]
    params: SamplingParams
    settings: dict[str, Any]


@dataclass(eq=False)
class _Answer:
    request_id: int
    index: int
    ids: list[int]
    params: SamplingParams
    detokenizer: Detokenizer
    stops: StopStrings | None
    num_prompt: int
    num_output: int = 0
    priority: int = 0


@dataclass
class Pool:
    """As many blocks as a BlockPool tells of."""

    num_blocks: int = 1000
    num_free: int = 1000


@dataclass
class _Scheduler:
    waiting: list[_Answer] = field(default_factory=list)
    running: list[_Answer] = field(default_factory=list)
    num_preemptions: int = 0


class ScriptedEngine:
    """`scripts`: one for each request in order (the last is repeated), or a function of the prompt's ids and the params.

    A text is encoded with control tokens as such; an answer that is not cut by max_tokens or a stop string ends with `eos_id`,
    which a script of ids may hold itself. All n answers of a request say the same. `gate` may be cleared to freeze the engine in
    a step; `seconds` is how long a step takes; `fails` makes a step raise when it is asked for this many more times.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scripts: Scripts = ("Hello!",),
        *,
        eos_id: int | None = None,
        max_model_len: int = 4096,
        max_num_seqs: int = 64,
        seconds: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.eos_id = tokenizer.special_tokens.get("<|im_end|>", 0) if eos_id is None else eos_id
        self.eos_ids = frozenset({self.eos_id})
        self.defaults = SamplingParams.from_generation_config({})
        self.seconds = seconds
        self.fails = 0
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[Asked] = []
        self.aborted: list[int] = []
        self.pool = Pool()
        self.scheduler = _Scheduler()
        self.num_corrupted = 0
        self.num_failed = 0
        self.healthy = True
        self._scripts: Scripts = scripts if callable(scripts) else list(scripts)
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def check_prompt(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise ValueError("prompt is empty, at least one token is needed")
        if len(prompt) >= self.max_model_len:
            raise ValueError(
                f"prompt is {len(prompt)} tokens long, but the context for prompt and answer is {self.max_model_len} tokens"
            )

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, **settings: Any) -> int:
        self.check_prompt(prompt)
        params = (params or SamplingParams()).with_defaults(self.defaults)
        self.asked.append(Asked(list(prompt), params, settings))
        ids = self._ids(list(prompt), params)
        request_id = self._next_id
        self._next_id += 1
        for index in range(params.n):
            answer = _Answer(
                request_id,
                index,
                list(ids),
                params,
                Detokenizer(self.tokenizer, skip_special=params.skip_special_tokens),
                StopStrings(params.stop, self.tokenizer if params.skip_special_tokens else None)
                if params.stop
                else None,
                len(prompt),
                priority=settings.get("priority", 0),
            )
            self.scheduler.waiting.append(answer)
        return request_id

    def abort(self, request_id: int) -> None:
        scheduler = self.scheduler
        known = len(scheduler.running) + len(scheduler.waiting)
        scheduler.running = [answer for answer in scheduler.running if answer.request_id != request_id]
        scheduler.waiting = [answer for answer in scheduler.waiting if answer.request_id != request_id]
        if len(scheduler.running) + len(scheduler.waiting) < known:
            self.aborted.append(request_id)
        self._count_blocks()

    def end(self, request_id: int) -> list[Delta]:
        left = [a for a in (*self.scheduler.running, *self.scheduler.waiting) if a.request_id == request_id]
        self.abort(request_id)
        return [Delta(request_id, a.index, (), a.detokenizer.finish(), finish_reason="length") for a in left]

    def reset(self) -> None:
        self.scheduler.running, self.scheduler.waiting = [], []
        self._count_blocks()

    def step(self) -> list[Delta]:
        assert self.gate.wait(60), "a test left the gate shut"
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the step failed, as the test asked")
        if self.seconds:
            time.sleep(self.seconds)
        scheduler = self.scheduler
        scheduler.waiting.sort(key=lambda answer: -answer.priority)
        while scheduler.waiting and len(scheduler.running) < self.max_num_seqs:
            scheduler.running.append(scheduler.waiting.pop(0))
        deltas = [self._next(answer) for answer in scheduler.running]
        ended = {(delta.request_id, delta.index) for delta in deltas if delta.finish_reason is not None}
        scheduler.running = [a for a in scheduler.running if (a.request_id, a.index) not in ended]
        self._count_blocks()
        return deltas

    def check_idle(self) -> None:
        assert not self.has_work
        assert self.pool.num_free == self.pool.num_blocks

    def _count_blocks(self) -> None:
        self.pool.num_free = self.pool.num_blocks - len(self.scheduler.running)

    def _ids(self, prompt: list[int], params: SamplingParams) -> list[int]:
        if callable(self._scripts):
            script = self._scripts(prompt, params)
        else:
            scripts = self._scripts
            assert isinstance(scripts, list)
            script = scripts.pop(0) if len(scripts) > 1 else scripts[0]
        if not isinstance(script, str):
            return list(script)
        return [*self.tokenizer.encode(script, allow_special=True), self.eos_id]

    def _next(self, answer: _Answer) -> Delta:
        params = answer.params
        token = answer.ids[answer.num_output] if answer.num_output < len(answer.ids) else self.eos_id
        answer.num_output += 1
        room = self.max_model_len - answer.num_prompt
        finish_reason: str | None = None
        stop_reason: int | str | None = None
        text = ""
        if token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos):
            finish_reason = "stop"
            stop_reason = token if token in params.stop_token_ids else None
        else:
            text = answer.detokenizer.push([token])
            if answer.num_output >= min(params.max_tokens or room, room):
                finish_reason = "length"
        if finish_reason is not None:
            text += answer.detokenizer.finish()
        if answer.stops is not None:
            text, matched = answer.stops.push(text, token)
            if matched is not None:
                finish_reason, stop_reason = "stop", matched
            elif finish_reason is not None:
                text += answer.stops.flush()
        first = answer.num_output == 1
        prompt_logprobs = None
        if first and params.prompt_logprobs is not None and answer.index == 0:
            prompt = self.asked[answer.request_id].prompt
            prompt_logprobs = (None, *(_described(token, params.prompt_logprobs) for token in prompt[1:]))
        return Delta(
            request_id=answer.request_id,
            index=answer.index,
            token_ids=(token,),
            text=text,
            logprobs=None if params.logprobs is None else (_described(token, params.logprobs),),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            prompt_logprobs=prompt_logprobs,
        )


def _described(token: int, count: int) -> TokenLogprob:
    """A log-probability made up of nothing but the token, so that tests can tell which is which."""
    top = tuple((token + place, -0.5 - place) for place in range(count))
    return TokenLogprob(token, -0.5, top)
