"""`qwenkit generate`: answers for every line of a JSONL file, computed as one running batch.

In: a file of requests and flags that hold for lines which say nothing else. Out: a file of answers in the same order. All
lines are checked before anything is written; finished ones are kept in OUTPUT.partial, from which the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from qwenkit.cli.jobs import Job, job_lines, read_job
from qwenkit.cli.journal import Journal, finished_lines
from qwenkit.cli.options import Verb, dataclass_options, given
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from qwenkit.engine.llm import LLM
    from qwenkit.engine.request import Completion, RequestOutput

NOT_A_FLAG = ("seed",)  # --seed is the requests'


@click.command(
    cls=Verb,
    epilog="""\b
Example:
  printf '%s\\n' '{"prompt": "1, 2, 3,"}' '{"messages": [{"role": "user", "content": "Hi"}]}' > in.jsonl
  qwenkit generate smollm2 --input in.jsonl --output out.jsonl --temperature 0 --max-tokens 50""",
)
@click.argument("model")
@click.option("--input", "input_", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Requests.")
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where answers go.")
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that is there already.")
@dataclass_options(SamplingParams, "Sampling, for lines that say nothing else (default: the model's own)")
@dataclass_options(EngineConfig, "Running the model", exclude=NOT_A_FLAG)
def generate(model: str, input_: Path, output: Path, overwrite: bool, **values: Any) -> None:
    """Answer every line of --input with MODEL, and write the answers in the same order to --output.

    A line is a JSON object with "prompt" (text as it is) or "messages" (through the chat template), and if wanted "id",
    "tools", "grammar" and any sampling field: {"prompt": "…", "temperature": 0.7, "seed": 1, "max_tokens": 100}.
    A grammar says what the answer must look like: {"kind": "json_schema", "source": {"type": "object"}}; other kinds are
    json_object, regex, choice (a list of texts) and lark.

    \b
    An answer is a JSON object:
      line               number of the request's line, from 1; blank lines count
      id                 as in the request, if it has one
      text               the answer
      finish_reason      stop, length, or error; then
      error              says why the answer was not finished
      prompt_tokens, completion_tokens
      completions        instead of text and finish_reason where n > 1: a list of both
      logprobs, prompt_logprobs   if asked for: a list of {token_id, logprob, top}

    Finished lines are kept in OUTPUT.partial. After an interruption the same command goes on from there.
    """
    settings = given(SamplingParams, values)
    SamplingParams(**settings)
    config = EngineConfig(
        **given(EngineConfig, {name: value for name, value in values.items() if name not in NOT_A_FLAG})
    )
    data = input_.read_bytes()
    _check_output(input_, output, overwrite)
    batch = Batch(data, settings)
    header = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model,
        "input": hashlib.sha256(data).hexdigest(),
        "sampling": json.loads(json.dumps(settings)),
    }
    path = output.with_name(output.name + ".partial")
    done = finished_lines(path, header)
    llm = None
    if len(done) < len(batch):
        from qwenkit.engine.llm import LLM

        llm = LLM(model, config, progress=sys.stderr.isatty())
        batch.check_prompts(llm, done)
    with Journal(path, header) as journal:
        if llm is not None:
            answer_all(llm, batch, journal)
        journal.finish(output)


def _check_output(input_: Path, output: Path, overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output is {output}, but there is no folder {output.parent}")
    if output.is_dir():
        raise ValueError(f"--output is {output}, which is a folder; allowed is the name of a file")
    if output.exists() and output.samefile(input_):
        raise ValueError(f"--output is {output}, which is the input itself")
    if output.exists() and not overwrite:
        raise ValueError(f"--output is {output}, which is there already; --overwrite replaces it")


class Batch:
    """The requests of a file. They are read again whenever they are drawn, so that a long file takes its bytes in memory only.

    Raises ValueError naming the line for the first one that is no valid request, and for a file without any.
    """

    def __init__(self, data: bytes, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.lines = job_lines(data)
        if not self.lines:
            raise ValueError("--input holds no requests")
        for _ in self.jobs(set()):
            pass

    def __len__(self) -> int:
        return len(self.lines)

    def jobs(self, done: set[int]) -> Iterator[Job]:
        """The requests whose lines are not in `done`."""
        return (read_job(number, data, self.settings) for number, data in self.lines if number not in done)

    def check_prompts(self, llm: LLM, done: set[int]) -> None:
        """Raise the ValueError that a request would meet in the engine: its template, its length, its token ids."""
        jobs = tqdm(self.jobs(done), desc="check", total=len(self) - len(done), unit="line", leave=False, disable=None)
        vocab_size = llm.model.config.vocab_size
        with jobs:
            for job in jobs:
                try:
                    llm.encode(job.prompt, tools=job.tools)
                    if job.params.grammar is not None:
                        llm.engine.grammars.compile(job.params.grammar)
                except ValueError as error:
                    raise ValueError(f"line {job.line}: {error}") from None
                for name in ("logit_bias", "stop_token_ids"):
                    wrong = [token for token in getattr(job.params, name) if token >= vocab_size]
                    if wrong:
                        raise ValueError(
                            f"line {job.line}: {name} has token id {wrong[0]}, allowed are 0 to {vocab_size - 1}"
                        )


def answer_all(llm: LLM, batch: Batch, journal: Journal) -> None:
    """Answer the requests that the journal does not hold yet; each is in it as soon as it is finished."""
    drawn: dict[int, Job] = {}  # by their places in what the model is given

    def draw() -> Iterator[tuple[list[int], SamplingParams]]:
        for place, job in enumerate(batch.jobs(done)):
            drawn[place] = job
            yield llm.encode(job.prompt, tools=job.tools), job.params

    done = journal.done
    tokens = 0
    started = time.monotonic()
    with tqdm(total=len(batch), initial=len(done), desc="generate", unit="line", disable=None) as bar:
        try:
            for place, output in llm.as_completed(draw()):
                job = drawn.pop(place)
                journal.append(job.line, as_record(job, output))
                tokens += sum(len(completion.token_ids) for completion in output.completions)
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tok/s", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            bar.close()
            click.echo(
                f"interrupted: {len(journal.done)} of {len(batch)} lines are kept in {journal.path}; "
                "the same command goes on from there",
                err=True,
            )
            raise


def as_record(job: Job, output: RequestOutput) -> dict[str, Any]:
    """The line of OUTPUT that answers a request; its shape is described by `generate --help`."""
    answers = [_as_answer(completion) for completion in output.completions]
    record: dict[str, Any] = {"line": job.line}
    if job.id is not None:
        record["id"] = job.id
    record |= answers[0] if job.params.n == 1 else {"completions": answers}
    record["prompt_tokens"] = len(output.prompt_token_ids)
    record["completion_tokens"] = sum(len(completion.token_ids) for completion in output.completions)
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if token is None else asdict(token) for token in output.prompt_logprobs]
    return record


def _as_answer(completion: Completion) -> dict[str, Any]:
    answer: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish_reason}
    if completion.error is not None:
        answer["error"] = completion.error
    if completion.logprobs is not None:
        answer["logprobs"] = [asdict(token) for token in completion.logprobs]
    return answer
