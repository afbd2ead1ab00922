"""Runs a model's own chat template safely: the program in jinja2's sandbox, callers' strings as inert data.

In: the template's text, and the variables it sees. Out: text in which whatever came from a caller is disguised: each
control token written in a message, a tool definition or an argument is replaced, before the template runs, by
characters that nothing else contains, and put back after the rendered text has been cut at the true control tokens.
`{% generation %}` blocks leave marks in the text.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Template

from qwenkit.text.chatml import NAMED
from qwenkit.text.template_budget import LimitError
from qwenkit.text.template_sandbox import LimitedEnvironment, render
from qwenkit.text.trial import try_template

# A noncharacter, never meant for interchange, then a private-use character saying what stands here. A caller's own
# U+FDD0 is disguised as well (code 0), so that after rendering each one begins a disguise or a mark.
_ESCAPE = "\ufdd0"
_FIRST_CODE = 0xF0000
GENERATION_START = _ESCAPE + chr(_FIRST_CODE + 1)
GENERATION_END = _ESCAPE + chr(_FIRST_CODE + 2)


# SHA-256 of templates that need no trial: what this package brings, and Qwen's own.
KNOWN = frozenset(
    {
        "793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb",  # Qwen2
        "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f",  # Qwen2.5
        "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",  # Qwen3
        *(hashlib.sha256(template.encode()).hexdigest() for template in NAMED.values()),
    }
)
_tried: set[str] = set()  # digests of the templates that passed in this process


class TemplateLimitError(ValueError):
    """A template takes too much time or memory."""


class ChatTemplate:
    """A compiled template. Raises ValueError where the source does not parse, or takes too much time or memory on trial."""

    def __init__(self, source: str) -> None:
        digest = hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()
        if digest not in KNOWN and digest not in _tried:
            try_template(source)
            _tried.add(digest)
        self._template = compile_template(source)
        self.marks_generation = re.search(r"{%-?\s*generation\b", source) is not None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text, with disguises and marks in it.

        Raises ValueError, with the template's own words, if it refuses, and TemplateLimitError if it takes too much.
        """
        return render_template(self._template, variables)


def compile_template(source: str) -> Template:
    """A template without a trial. Raises ValueError."""
    try:
        return LimitedEnvironment((GENERATION_START, GENERATION_END)).limited_template(source)
    except LimitError as error:
        raise TemplateLimitError(f"the chat template {error}") from None
    except RecursionError:
        raise ValueError("the chat template does not parse: it is nested too deeply") from None
    except Exception as error:  # jinja2's TemplateError, and what Python says of a number with a million digits
        raise ValueError(f"the chat template does not parse: {str(error)[:1000]}") from None


def render_template(template: Template, variables: Mapping[str, Any]) -> str:
    """See `ChatTemplate.render`."""
    try:
        return render(template, variables)
    except LimitError as error:
        raise TemplateLimitError(f"the chat template {error}") from None
    except RecursionError:
        raise TemplateLimitError("the chat template calls itself too deeply") from None
    except MemoryError:
        raise TemplateLimitError("the chat template takes more memory than there is") from None
    except Exception as error:  # the template is a foreign program: anything may come out of it
        raise ValueError(f"the chat template refuses these messages: {str(error)[:1000]}") from error


def sample_variables() -> Iterator[dict[str, Any]]:
    """Conversations for a trial: a question, and one with a system message, tools, a call and its result."""
    question = {"role": "user", "content": "Hello"}
    tool = {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "id": "1", "function": {"name": "clock", "arguments": {}}}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "add_generation_prompt": True}
    yield tokens | {"messages": [question], "tools": None, "documents": None}
    yield tokens | {
        "messages": [
            {"role": "system", "content": "Be brief."},
            question,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "noon", "tool_call_id": "1", "name": "clock"},
            {"role": "assistant", "content": "It is noon."},
            question,
        ],
        "tools": [{"type": "function", "function": tool}],
        "documents": None,
    }


class Disguise:
    """Keeps the control tokens that callers write from becoming control tokens."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        written = [_ESCAPE, "", "", *(token for token in control_tokens if token)]
        codes = {text: _ESCAPE + chr(_FIRST_CODE + code) for code, text in enumerate(written) if text}
        self._codes = codes
        self._texts = {code: text for text, code in codes.items()}
        self._written = re.compile("|".join(map(re.escape, sorted(codes, key=len, reverse=True))))
        self._coded = re.compile("|".join(map(re.escape, self._texts)))

    def put_on(self, value: Any, field: str) -> Any:
        """A copy of a JSON value in which each string is disguised. Raises ValueError naming `field` if it is not JSON.

        Copying also means that a template sees plain lists and dicts only, never an object with methods.
        """
        if isinstance(value, str):
            return self._written.sub(lambda match: self._codes[match.group()], value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {self.put_on(key, field): self.put_on(item, f"{field}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_on(item, f"{field}[{index}]") for index, item in enumerate(value)]
        raise ValueError(
            f"{field} is a {type(value).__name__}; allowed are text, numbers, booleans, null, lists and objects of them"
        )

    def take_off(self, text: str) -> str:
        """What the caller wrote."""
        return self._coded.sub(lambda match: self._texts[match.group()], text)
