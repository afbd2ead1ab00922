"""The shape of a record, recognised by its fields: what the documents of LLaMA-Factory, Qwen, ms-swift and TRL show.

In: a record of a data set that says nothing about itself. Out: the formatting and columns that a registry would name. The less a
set of fields says, the later it is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwenkit.train.data.fields import BadRecordError, as_list

# ms-swift's and TRL's names of a question and of an answer to it.
_QUESTIONS = ("query", "prompt", "question", "problem", "instruction", "input")
_ANSWERS = ("response", "completion", "answer", "output", "solution", "target")
_REJECTED = ("rejected", "rejected_response")


def recognise(record: Mapping[str, Any], stage: str) -> tuple[str, dict[str, str]]:
    """(formatting, columns). Raises BadRecordError naming the fields where none of the shapes has them."""
    if "input_ids" in record:
        return "tokens", {}
    if stage == "pt":
        return "text", {}
    rejected = next((name for name in (*_REJECTED, "rejected_messages") if record.get(name) is not None), "rejected")
    for key, formatting in (("conversations", "sharegpt"), ("messages", "openai")):
        if key in record:
            return formatting, {"rejected": rejected}
    if "conversation" in record:
        return "turns", {"messages": "conversation"}
    if "chosen" in record and as_list(record["chosen"]) is not None and "prompt" not in record:
        return "openai", {}
    if "instruction" in record and not ("response" in record and "output" not in record):
        return "alpaca", {}
    question = next((name for name in _QUESTIONS if name in record), None)
    answer = next((name for name in _ANSWERS if name in record and name != question), None)
    if question is not None and (answer is not None or "chosen" in record):
        columns = {"prompt": question, "rejected": rejected}
        extra = "context" if question == "instruction" and "context" in record else "input"
        if extra in record and question not in ("input", extra):
            columns["query"] = extra
        if answer is not None:
            columns["response"] = answer
            if "chosen" not in record and rejected in record:  # ms-swift: the answer is the chosen one
                columns["chosen"] = answer
        return "alpaca", columns
    if "text" in record:
        return "text", {}
    fields = ", ".join(map(str, record)) or "none"
    raise BadRecordError("missing field", f"no known format has these fields: {fields}; name them in dataset_info.json")
