"""The process of a trial: `python -m qwenkit.text.trial_worker`, started by trial.py.

In, on stdin: one message with what to try and the limits. Out, on stdout: what is wrong with it. Where a limit ends the process
there is no answer, which is one too.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from qwenkit.text.child_process import limit_cpu, limit_memory, receive, send

MAX_CHARACTERS = 48  # of a tokenizer's patterns that are tried
LONG_RUN = 50_000  # of one character: a quadratic pattern takes seconds for it
SHORT_RUN = 24  # of one character: an exponential pattern exceeds the regex engine's limit of retries


def main() -> None:
    message = receive(sys.stdin.buffer)
    if message is None:
        return
    if message["kind"] == "tokenizer":
        import tokenizers  # noqa: F401 - not counted among what the limits allow
    else:
        import qwenkit.text.template  # noqa: F401
    limit_memory(message["memory"])
    limit_cpu(message["cpu_seconds"], wall=message["wall_seconds"])
    error: str | None = None
    try:
        if message["kind"] == "tokenizer":
            _try_tokenizer(message["steps"], message["growth"])
        else:
            _try_template(message["template"])
    except ValueError as found:
        error = str(found)
    except MemoryError:
        return
    except BaseException as found:  # a panic of a Rust library
        error = f"makes its library fail: {(str(found).splitlines() or [''])[0][:200]}"
    send(sys.stdout.buffer, {"error": error})


def _try_tokenizer(steps: dict[str, Any], growth: float) -> None:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model} | steps))
    for text in difficult_texts(json.dumps(steps, ensure_ascii=False)):
        if tokenizer.normalizer is not None:
            normal = tokenizer.normalizer.normalize_str(text)
            if len(normal) > growth * (len(text) + 1):
                raise ValueError(f"makes {len(normal)} characters of {len(text)}")
            text = normal
        if tokenizer.pre_tokenizer is not None:
            tokenizer.pre_tokenizer.pre_tokenize_str(text)


def difficult_texts(patterns: str) -> Iterator[str]:
    """Runs of the characters that the patterns name and of others, of a length that slow patterns do not bear."""
    characters = list(dict.fromkeys(["a", "A", "1", " ", "\n", "!", "\u4f60", "\u00e9", "'", *sorted(set(patterns))]))
    characters = characters[:MAX_CHARACTERS]
    everything = "! " + "".join(characters)  # what a pattern needs later on, so that no engine gives up early
    for one in characters:
        for end in ("", "!", "b", "\n", everything):
            yield one * SHORT_RUN + end
        yield (one * (SHORT_RUN - 2) + "!") * 20
    for one in characters:
        for other in characters[:8]:
            yield (one + other) * SHORT_RUN + everything
    for one in characters:
        yield one * LONG_RUN + everything


def _try_template(source: str) -> None:
    """Raise ValueError for a template that does not parse or takes too much."""
    from qwenkit.text.template import TemplateLimitError, compile_template, render_template, sample_variables

    try:
        template = compile_template(source)
        for variables in sample_variables():
            try:
                render_template(template, variables)
            except TemplateLimitError:
                raise
            except ValueError:
                continue  # it has no place for such messages
    except ValueError as error:
        raise ValueError(str(error).removeprefix("the chat template ")) from None


if __name__ == "__main__":
    main()
