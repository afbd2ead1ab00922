"""`qwenkit chat`: a conversation at the terminal, or one answer for a prompt that is given or piped in.

In: flags, and standard input where it is no terminal. Out: the answer on stdout; numbers and notices on stderr, or dim under
each answer of a conversation. The model runs in this process, or behind --url (then torch is never imported).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click

from qwenkit.cli.conversation.keyboard import held_keys
from qwenkit.cli.conversation.screen import Meter, Screen, doing_of, show_answer
from qwenkit.cli.conversation.spinner import Spinner
from qwenkit.cli.conversation.state import NOT_IN_CHAT, Conversation, Piece, Talker
from qwenkit.cli.options import Verb, dataclass_options, given
from qwenkit.compat.verbs import Inference, is_settings_file, read_inference
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.sampling import SamplingParams

DEFAULT_MODEL = "smollm2"  # hub.smollm2.ALIAS, without importing it
NOT_A_FLAG = ("seed",)  # --seed is the request's


@click.command(
    cls=Verb,
    epilog="""\b
Examples:
  qwenkit chat
  qwenkit chat smollm2 "What is the capital of Germany?" --temperature 0
  git diff | qwenkit chat Qwen/Qwen3-0.6B "Write a commit message for this."
  qwenkit chat --url http://127.0.0.1:8000/v1 "Hello"
  qwenkit chat --url https://dashscope.aliyuncs.com/compatible-mode/v1 --model qwen-plus""",
)
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option(
    "--model", "named", metavar="MODEL", help="The same as the first word; with --url the only way to name a model."
)
@click.option("--system", metavar="TEXT", help="System text; the model's own by default.")
@click.option("--raw", is_flag=True, help="Continue PROMPT as plain text, without the chat template (base models).")
@click.option("--url", metavar="URL", help="Talk to an OpenAI-compatible server; what is not a flag is then PROMPT.")
@click.option(
    "--api-key", metavar="KEY", help="Key for --url; else OPENAI_API_KEY, for DashScope's hosts DASHSCOPE_API_KEY."
)
@dataclass_options(SamplingParams, "Sampling (the model's own where nothing is said)", exclude=NOT_IN_CHAT)
@dataclass_options(EngineConfig, "Running the model (without --url)", exclude=NOT_A_FLAG)
def chat(
    model: str | None,
    prompt: str | None,
    named: str | None,
    system: str | None,
    raw: bool,
    url: str | None,
    api_key: str | None,
    **values: Any,
) -> None:
    """Talk to MODEL: a folder, a .gguf file, a hub id, smollm2 (the small default model), or LLaMA-Factory's YAML file.

    With PROMPT, or with text piped in (it is put after PROMPT when both are given), one answer is written to standard output.
    Without, a conversation begins; /help in it shows its commands.
    """
    model, prompt = _model_and_prompt(model, prompt, named, url)
    settings = given(SamplingParams, values)
    engine = given(EngineConfig, {name: value for name, value in values.items() if name not in NOT_A_FLAG})
    file: Inference | None = None
    if url is None and model is not None and is_settings_file(model):
        file = read_inference(Path(model))
        for note in file.notes:
            click.echo(f"note: {note}", err=True)
        model, settings, engine = file.model, file.sampling | settings, file.engine | engine
        system = file.system if system is None and not raw else system
    SamplingParams(**settings)
    config = EngineConfig(**engine)
    _check_flags(model, prompt, system, raw, url, api_key, engine)
    text = _whole_prompt(prompt)
    if text is None and raw:
        raise click.UsageError("--raw continues one text: give PROMPT, or pipe it in.")
    if text is None and not sys.stdout.isatty():
        raise click.UsageError("A conversation needs a terminal on standard output; give PROMPT for one answer.")
    with _talker(model, url, api_key, config, file) as talker:
        conversation = Conversation(talker, system, settings)
        if text is None:
            _converse(conversation)
        else:
            _answer_once(
                talker.stream(text, conversation.params()) if raw else conversation.ask(text), doing_of(talker)
            )


def _model_and_prompt(
    first: str | None, second: str | None, named: str | None, url: str | None
) -> tuple[str | None, str | None]:
    """Which of the words is what: with --url, and where --model names the model, the one word is PROMPT."""
    if named is None and url is None:
        return first, second
    if second is not None:
        given = "--url" if named is None else "--model"
        raise click.UsageError(
            f"With {given} there is one PROMPT and no MODEL before it, given were {first!r} and {second!r}; "
            "--model names the model."
        )
    return named, first


def _check_flags(
    model: str | None,
    prompt: str | None,
    system: str | None,
    raw: bool,
    url: str | None,
    api_key: str | None,
    engine: dict[str, Any],
) -> None:
    """Combinations that mean nothing are said, not ignored."""
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template, --raw goes without: give one of them.")
    if url is not None and raw:
        raise click.UsageError("--raw is for models that run here, not for --url.")
    if url is not None and engine:
        raise click.UsageError(f"--{next(iter(engine)).replace('_', '-')} is for models that run here, not for --url.")
    if url is None and api_key is not None:
        raise click.UsageError("--api-key is for the server of --url.")
    if model is not None and prompt is None and any(map(str.isspace, model)) and not Path(model).exists():
        raise click.UsageError(
            f"{model!r} is taken for MODEL; a PROMPT stands after it: qwenkit chat {DEFAULT_MODEL} …"
        )


@contextmanager
def _talker(
    model: str | None, url: str | None, api_key: str | None, config: EngineConfig, file: Inference | None
) -> Iterator[Talker]:
    if url is not None:
        from qwenkit.cli.conversation.remote import Remote, find_key

        with closing(Remote(url, model, find_key(url, api_key, os.environ))) as remote:
            yield remote
    else:
        from qwenkit.hub import smollm2
        from qwenkit.hub.find import find_model

        name = model if model is not None else DEFAULT_MODEL
        path = find_model(name, progress=sys.stderr.isatty())  # a download has a bar of its own
        adapter = None if file is None else file.adapter
        lora = {} if adapter is None else {Path(adapter).name: adapter}
        # What is typed while it loads waits for the prompt, too.
        with held_keys(sys.stdin), Spinner(sys.stderr, lambda: f"loading {name}"):
            from qwenkit.cli.conversation.local import Local
            from qwenkit.engine.llm import LLM

            llm = LLM(path, config) if file is None else LLM(path, config, lora=lora, template=file.template)
        yield Local(
            llm,
            name,
            adapter=next(iter(lora), None),
            variables=None if file is None else file.variables,
            defaults=smollm2.CHAT_DEFAULTS if name == smollm2.ALIAS else None,
        )


def _whole_prompt(prompt: str | None) -> str | None:
    """PROMPT and what is piped in; None when there is neither and a terminal to talk at."""
    if not sys.stdin.isatty():
        piped = _read_stdin()
        prompt = f"{prompt}\n\n{piped}" if prompt and piped.strip() else prompt or piped
        if not prompt.strip():
            raise click.UsageError("There is nothing to answer: standard input is empty, and no PROMPT is given.")
    if prompt is not None:
        if not prompt.strip():
            raise click.UsageError("There is nothing to answer: PROMPT is empty.")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError("PROMPT holds bytes that are not UTF-8 text") from None
    return prompt


def _read_stdin() -> str:
    """Standard input to its end. One that never ends is a riddle, so a slow one is announced."""
    notice = threading.Timer(2.0, lambda: click.echo("reading standard input …", err=True))
    notice.daemon = True
    notice.start()
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text (byte {error.start + 1})") from None
    finally:
        notice.cancel()


def _answer_once(pieces: Generator[Piece, None, None], doing: Callable[[], str]) -> None:
    meter = Meter(asked=time.monotonic())
    show_answer(pieces, Screen(sys.stdout), meter, doing)
    numbers = Screen(sys.stderr)
    if numbers.is_terminal:
        numbers.line(meter.summary(), dim=True)


def _converse(conversation: Conversation) -> None:
    from qwenkit.cli.conversation.terminal import Terminal, open_history
    from qwenkit.storage import cache_folder

    Terminal(conversation, Screen(sys.stdout), open_history(cache_folder() / "chat_history")).run()
