"""LLM: a model to call from Python. It opens a model, and drives an engine for whoever wants answers, a stream or scores.

In: prompts as text, token ids or chat messages. Out: `RequestOutput`s, `Delta`s while they are written, or `Score`s.
Not thread-safe: the engine runs inside the calls. A server puts the engine in a thread of its own instead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from qwenkit import ops
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.engine import Engine
from qwenkit.engine.heap import give_back_heap
from qwenkit.engine.memory import choose_cache_dtype, choose_device, choose_dtype, choose_weights, plan_cache
from qwenkit.engine.request import Completion, Delta, RequestOutput
from qwenkit.engine.runner import Runner
from qwenkit.engine.sampling import SamplingParams
from qwenkit.hub.find import find_model
from qwenkit.model.context import pack
from qwenkit.storage import cache_folder
from qwenkit.text.chat import ChatFormat
from qwenkit.text.chatml import CHATML
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model, plain_types
from qwenkit.weights.repacked import load_packed
from qwenkit.weights.templated import Templated, can_use_chatml, replaced_template, with_template

log = logging.getLogger("qwenkit.engine")

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | AbstractSequence[int] | AbstractSequence[Message]

SCORE_ROWS = 256  # rows of hidden states that meet the vocabulary at once while scoring


@dataclass(frozen=True)
class Score:
    """Natural log-likelihoods of a text: one value a token, None for the first, which nothing precedes."""

    token_ids: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        """Log-likelihood of the text after its first token."""
        return sum(value for value in self.logprobs if value is not None)


class LLM:
    """A model by folder, .gguf file, alias (`smollm2`) or hub id, ready to generate.

    Settings are those of EngineConfig, given as one or by name: `LLM("smollm2", kv_memory="1GiB", max_model_len=4096)`.
    `lora` names LoRA adapters by folder: `LLM("smollm2", lora={"poet": "adapters/poet"}).generate(text, adapter="poet")`.
    `template` is the chat template of a model that has none: qwen, chatml, or a .jinja file, which replaces any.
    Raises ValueError or FileNotFoundError, one sentence, for anything that cannot be found, read or fit.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        lora: Mapping[str, str | Path] | None = None,
        template: str = "default",
        progress: bool = False,
        **settings: Any,
    ) -> None:
        self.config = _with_settings(config or EngineConfig(), settings)
        checkpoint = with_template(open_checkpoint(find_model(str(model), progress=progress)), template)
        if self.config.chat_template is not None:
            checkpoint = replaced_template(checkpoint, self.config.chat_template)
        self.default_params = SamplingParams.from_generation_config(checkpoint.generation_config)
        ops.use()
        device = choose_device(self.config.device)
        weights = choose_weights(self.config, device)
        with ThreadPoolExecutor(1) as beside:  # a large vocabulary takes as long to parse as packed weights to read
            tokenizer = beside.submit(checkpoint.tokenizer)
            if weights == "float":
                dtype = choose_dtype(self.config.dtype, checkpoint.config.get("dtype"), device)
                self.model = load_model(checkpoint, dtype=dtype, device=device, progress=progress)
            else:
                dtype = torch.float32
                self.model = load_packed(checkpoint, weights, cache_folder() / "packed", progress=progress)
        self.tokenizer = tokenizer.result()
        if self.config.weights == self.config.dtype == "auto" and (weights == "bf16" or dtype == torch.bfloat16):
            wider = [name for name in plain_types(checkpoint) if name != "bfloat16"]
            if wider:
                log.warning(
                    "%s has weights in %s, which are rounded to bfloat16; --weights float --dtype float32 keeps their values",
                    checkpoint.path,
                    " and ".join(wider),
                )
        self.chat_format: ChatFormat | None = checkpoint.chat()
        if self.chat_format is None and can_use_chatml(self.tokenizer):
            self.chat_format = Templated(checkpoint, CHATML).chat()
            log.warning("%s has no chat template, so ChatML is used; --chat-template gives another", checkpoint.path)
        give_back_heap()
        cache_dtype = choose_cache_dtype(self.config, weights, dtype)
        num_blocks, self.max_model_len = plan_cache(self.model.config, self.config, cache_dtype, device)
        runner = Runner(
            self.model,
            num_blocks=num_blocks,
            block_size=self.config.block_size,
            max_model_len=self.max_model_len,
            graphs=self.config.graphs,
            cache_dtype=cache_dtype,
        )
        self.engine = Engine(
            runner,
            self.tokenizer,
            self.config,
            max_model_len=self.max_model_len,
            eos_ids=checkpoint.eos_token_ids,
            defaults=self.default_params,
        )
        runner.adapters.stored = checkpoint.tensors
        for name, path in (lora or {}).items():
            self.engine.load_adapter(name, path)
        self._inbox: dict[int, deque[Delta]] = {}

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: AbstractSequence[Message] | None = None,
        allow_special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a prompt: text as it is, chat messages through the model's template, ids unchanged.

        `tools` and `variables` (such as enable_thinking) go to the template. Control tokens written in a text stay plain text
        unless `allow_special`. Raises ValueError when the template refuses the messages or the context cannot hold the prompt.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_document(prompt, allow_special=allow_special)
        elif all(isinstance(item, int) for item in prompt):
            ids = list(prompt)  # type: ignore[arg-type]
        elif self.chat_format is None:
            raise ValueError(
                "the model has no chat template, so it takes a prompt as text, not as messages; --chat-template gives one"
            )
        else:
            messages: AbstractSequence[Message] = prompt  # type: ignore[assignment]
            return self._fitting(self.chat_format.render(messages, tools=tools, **variables).ids)
        if tools is not None or variables:
            raise ValueError(
                f"tools and template variables need a prompt of chat messages, given was {type(prompt).__name__}"
            )
        return self._fitting(ids)

    def generate(
        self,
        prompts: Prompt | AbstractSequence[Prompt],
        params: SamplingParams | AbstractSequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        progress: bool = False,
        allow_special: bool = False,
    ) -> list[RequestOutput]:
        """Answers to one prompt or many (text or token ids), in the order given, computed as one running batch."""
        many = _as_many(prompts)
        ids = [self.encode(prompt, allow_special=allow_special) for prompt in many]
        return self._all(ids, params, adapter, progress)

    def chat(
        self,
        messages: AbstractSequence[Message] | AbstractSequence[AbstractSequence[Message]],
        params: SamplingParams | AbstractSequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        tools: AbstractSequence[Message] | None = None,
        progress: bool = False,
        **variables: Any,
    ) -> list[RequestOutput]:
        """Answers to one conversation or many, each a list of {"role", "content"} messages."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        ids = [self.encode(c, tools=tools, **variables) for c in conversations]
        return self._all(ids, params, adapter, progress)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        tools: AbstractSequence[Message] | None = None,
        allow_special: bool = False,
        **variables: Any,
    ) -> Iterator[Delta]:
        """The answer as it is written; closing the iterator ends the request. A bad prompt raises at once."""
        ids = self.encode(prompt, tools=tools, allow_special=allow_special, **variables)
        return self._deltas(ids, params, adapter)

    @property
    def prefill_progress(self) -> tuple[int, int] | None:
        """(computed, all) tokens of the prompts that are being read; None while there are none. Any thread may ask."""
        reading = [item for item in list(self.engine.scheduler.running) if item.num_computed < item.num_prompt]
        if not reading:
            return None
        return sum(item.num_computed for item in reading), sum(item.num_prompt for item in reading)

    def as_completed(
        self, requests: Iterable[tuple[Prompt, SamplingParams | None]], *, adapter: str | None = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """(place in `requests`, output) as they finish. `requests` is drawn from as the engine has room, so it may be endless."""
        pending = enumerate(requests)
        live: dict[int, tuple[int, _Collector]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(live) < 2 * self.config.max_num_seqs:
                    item = next(pending, None)
                    if item is None:
                        exhausted = True
                        break
                    place, (prompt, params) = item
                    ids = self.encode(prompt)
                    live[self._add(ids, params, adapter)] = place, _Collector(ids, params.n if params else 1)
                if not live:
                    return
                self._step()
                for request_id in [request_id for request_id in live if self._inbox[request_id]]:
                    place, collector = live[request_id]
                    output = collector.take(self._inbox[request_id])
                    if output is not None:
                        del live[request_id], self._inbox[request_id]
                        yield place, output
        finally:
            for request_id in live:
                self._forget(request_id)

    def score(self, texts: str | AbstractSequence[str | AbstractSequence[int]]) -> list[Score]:
        """Log-likelihood of every token of each text (or list of token ids) under the model, without sampling."""
        many: Any = [texts] if isinstance(texts, str) else texts
        documents = [self.tokenizer.encode_document(text) if isinstance(text, str) else list(text) for text in many]
        for place, document in enumerate(documents):
            if not document:
                raise ValueError(f"text {place} is empty, at least one token is needed")
            if len(document) > self.model.config.max_position_embeddings:
                raise ValueError(
                    f"text {place} is {len(document)} tokens long, but the model's context is "
                    f"{self.model.config.max_position_embeddings} tokens"
                )
        scores: list[Score] = []
        start = 0
        while start < len(documents):
            stop, total = start, 0
            while stop < len(documents) and (
                stop == start or total + len(documents[stop]) <= self.config.max_batch_tokens
            ):
                total += len(documents[stop])
                stop += 1
            scores += self._score_packed(documents[start:stop])
            start = stop
        return scores

    @torch.inference_mode()
    def _score_packed(self, documents: list[list[int]]) -> list[Score]:
        device = self.engine.runner.device
        ids, positions, ctx = pack(documents, self.model.config, device)
        hidden = self.model(ids, positions, ctx)
        following = torch.cat((ids[1:], ids[:1]))  # a document's last row pairs with a stranger and is dropped below
        values = torch.cat(
            [
                self.model.logits(rows).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
                for rows, targets in zip(hidden.split(SCORE_ROWS), following.split(SCORE_ROWS), strict=True)
            ]
        )
        parts = values.split(list(ctx.lengths))
        return [Score(document, [None, *part[:-1].tolist()]) for document, part in zip(documents, parts, strict=True)]

    def _fitting(self, ids: list[int]) -> list[int]:
        self.engine.check_prompt(ids)
        return ids

    def _add(self, ids: list[int], params: SamplingParams | None, adapter: str | None) -> int:
        request_id = self.engine.add(ids, params, adapter=adapter)
        self._inbox[request_id] = deque()
        return request_id

    def _step(self) -> None:
        for delta in self.engine.step():
            self._inbox[delta.request_id].append(delta)

    def _forget(self, request_id: int) -> None:
        self.engine.abort(request_id)
        self._inbox.pop(request_id, None)

    def _deltas(self, ids: list[int], params: SamplingParams | None, adapter: str | None) -> Iterator[Delta]:
        request_id = self._add(ids, params, adapter)
        inbox = self._inbox[request_id]
        count = params.n if params else 1
        try:
            while count:
                while not inbox:
                    self._step()
                delta = inbox.popleft()
                count -= delta.finish_reason is not None
                yield delta
        finally:
            self._forget(request_id)

    def _all(
        self,
        prompts: list[list[int]],
        params: SamplingParams | AbstractSequence[SamplingParams] | None,
        adapter: str | None,
        progress: bool,
    ) -> list[RequestOutput]:
        each = params if params is not None and not isinstance(params, SamplingParams) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(
                f"params has {len(each)} entries, but there are {len(prompts)} prompts; give one, or one for each"
            )
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        with tqdm(total=len(prompts), desc="generate", unit="prompt", disable=not progress) as bar:
            for place, output in self.as_completed(zip(prompts, each, strict=True), adapter=adapter):
                outputs[place] = output
                bar.update()
        return [output for output in outputs if output is not None]


class _Collector:
    """Puts a request's deltas together."""

    def __init__(self, prompt: list[int], n: int) -> None:
        self.prompt = prompt
        self.unfinished = n
        self.deltas: list[list[Delta]] = [[] for _ in range(n)]

    def take(self, inbox: deque[Delta]) -> RequestOutput | None:
        """Empty the inbox; the output once every answer has ended."""
        while inbox:
            delta = inbox.popleft()
            self.deltas[delta.index].append(delta)
            self.unfinished -= delta.finish_reason is not None
        if self.unfinished:
            return None
        first = self.deltas[0][0]
        return RequestOutput(
            prompt_token_ids=self.prompt,
            completions=[_completion(deltas) for deltas in self.deltas],
            prompt_logprobs=None if first.prompt_logprobs is None else list(first.prompt_logprobs),
            num_cached_tokens=first.num_cached_tokens,
        )


def _completion(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish_reason is not None
    return Completion(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        logprobs=None
        if all(delta.logprobs is None for delta in deltas)
        else [one for delta in deltas for one in delta.logprobs or ()],
        error=last.error,
    )


def _as_many(prompts: Any) -> list[Prompt]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if single else list(prompts)


def _with_settings(config: EngineConfig, settings: dict[str, Any]) -> EngineConfig:
    known = EngineConfig.__dataclass_fields__
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is not a setting of LLM; known are {', '.join(known)}")
    return replace(config, **settings)
