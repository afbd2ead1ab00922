"""Labels of older trainers, token for token: Qwen's finetune.py (`qwen1`) and MindFormers' qwen1_5 (`mindformers`)."""

from __future__ import annotations

from qwenkit.text.chat import JinjaChat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.batch import IGNORE, Sample
from qwenkit.train.data.fields import BadRecordError, Message
from qwenkit.train.data.formats import Example
from qwenkit.train.data.preprocess import CHATML

QWEN1_SYSTEM = "You are a helpful assistant."
Notes = list[tuple[str, str]]


def qwen1(example: Example, origin: str, tokenizer: Tokenizer) -> tuple[Sample, Notes]:
    """finetune.py: <|im_start|>, <|im_end|> and the newline after it are learned in every turn, and the answers' text.

    The system text is the record's, else a fixed one; a first turn that is not the user's is left out; other roles are refused.
    Unlike there, control tokens written in a text stay plain text.
    """
    encode, specials = tokenizer.encode, tokenizer.special_tokens
    start, end, newline = specials["<|im_start|>"], specials["<|im_end|>"], encode("\n")
    messages, notes = list(example.messages), _lost(example)
    system: Message = {"role": "system", "content": QWEN1_SYSTEM}
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)
    for message in messages:
        if message["role"] not in ("user", "assistant") or message.get("tool_calls"):
            raise BadRecordError("bad role", f"a turn of {message['role']!r} has no place in labels qwen1")
    if messages and messages[0]["role"] != "user":
        messages = messages[1:]
        notes.append(("first turn left out", "labels qwen1 begins with the user's turn"))
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRecordError("missing field", "there is no answer of the assistant")
    ids: list[int] = []
    labels: list[int] = []
    for message in [system, *messages]:
        header, text = [*encode(message["role"]), *newline], encode(message["content"])
        ids += [start, *header, *text, end, *newline]
        is_learned = message["role"] == "assistant" and message.get("weight", 1)
        labels += [start, *[IGNORE] * len(header), *(text if is_learned else [IGNORE] * len(text)), end, *newline]
    return Sample(ids, labels, origin), notes


def mindformers(example: Example, origin: str, tokenizer: Tokenizer, chatml: JinjaChat) -> tuple[Sample, Notes]:
    """qwen1_5_preprocess.py: ChatML as the messages stand, all of it learned, except around padding tokens."""
    notes = _lost(example)
    if any(message.get("weight", 1) == 0 for message in example.messages):
        notes.append(("mark without effect", "labels mindformers learns every turn, also one of weight 0"))
    if any(message.get("tool_calls") for message in example.messages):
        raise BadRecordError("call not written", "labels mindformers has no place for tool calls")
    ids = chatml.render(example.messages, add_generation_prompt=False).ids
    pad = tokenizer.special_tokens.get("<|endoftext|>")
    labels = [IGNORE if pad in (id, before) else id for before, id in zip([None, *ids], ids, strict=False)]
    return Sample(ids, labels, origin), notes


def chatml_of(tokenizer: Tokenizer) -> JinjaChat:
    """The format in which MindFormers' tools write conversations."""
    return JinjaChat(tokenizer, CHATML)


def _lost(example: Example) -> Notes:
    """What these schemes have no place for."""
    notes: Notes = []
    if example.tools:
        notes.append(("tools not written", "labels qwen1 and mindformers have no place for tools"))
    if any(message.get("reasoning_content") for message in example.messages):
        notes.append(("thoughts not written", "labels qwen1 and mindformers have no place for thoughts apart"))
    return notes
