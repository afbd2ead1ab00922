"""`qwenkit generate` with a scripted model: the lines it takes, the lines it writes, and going on after an interruption."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.cli.generate import as_record
from qwenkit.cli.jobs import Job, read_job
from qwenkit.cli.main import cli
from qwenkit.engine.request import Completion, RequestOutput, TokenLogprob
from qwenkit.engine.sampling import SamplingParams
from tests.cli.conftest import FakeLLM
from tests.tiny_models import write_model

REQUESTS: list[dict[str, Any]] = [
    {"prompt": f"question number {number} of many", "id": f"q{number}", "seed": number} for number in range(11)
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    return source, tmp_path / "out.jsonl"


def run(runner: CliRunner, files: tuple[Path, Path], *flags: str) -> Result:
    return runner.invoke(cli, ["generate", "tiny", "--input", str(files[0]), "--output", str(files[1]), *flags])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_answers_come_in_the_order_of_the_lines(
    runner: CliRunner, fake_llm: list[FakeLLM], files: tuple[Path, Path]
) -> None:
    result = run(runner, files, "--max-tokens", "4", "--temperature", "0", "--max-num-seqs", "4")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    answers = read(files[1])
    assert [answer["line"] for answer in answers] == list(range(1, 12))
    assert [answer["id"] for answer in answers] == [request["id"] for request in REQUESTS]
    llm = fake_llm[0]
    assert llm.config is not None
    assert llm.config.max_num_seqs == 4
    for answer, request in zip(answers, REQUESTS, strict=True):
        words, reason = llm.answer(
            llm.encode(request["prompt"]), SamplingParams(seed=request["seed"], max_tokens=4, temperature=0)
        )
        assert answer["text"] == " ".join(words)
        assert (answer["finish_reason"], answer["completion_tokens"]) == (reason, len(words))
        assert answer["prompt_tokens"] == 5
    assert sorted(path.name for path in files[1].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_lines_override_flags_and_null_takes_back(runner: CliRunner, fake_llm: list[FakeLLM], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_text('\ufeff{"prompt": "a", "max_tokens": null}\r\n\n{"prompt": "a"}\n{"prompt": "a", "n": 2}')
    assert run(runner, (source, tmp_path / "out"), "--max-tokens", "2").exit_code == 0
    first, second, third = read(tmp_path / "out")
    assert (first["line"], first["completion_tokens"]) == (1, 4)
    assert (second["line"], second["completion_tokens"]) == (3, 2)
    assert third["line"] == 4
    assert [set(one) for one in third["completions"]] == [{"text", "finish_reason"}] * 2
    assert third["completion_tokens"] == 4
    assert "text" not in third


def test_messages_and_tools_go_through_the_template(runner: CliRunner, fake_llm: list[FakeLLM], tmp_path: Path) -> None:
    source = tmp_path / "in"
    messages = [{"role": "user", "content": "hi there"}]
    source.write_text(json.dumps({"messages": messages, "tools": [{"type": "function"}]}) + "\n")
    assert run(runner, (source, tmp_path / "out")).exit_code == 0
    assert read(tmp_path / "out")[0]["prompt_tokens"] == 3  # two words, and one for the tools


@pytest.mark.parametrize("stop_after", range(12))
def test_an_interrupted_run_goes_on(
    runner: CliRunner,
    fake_llm: list[FakeLLM],
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    def press(step: int) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    original = FakeLLM.__init__

    def interrupted(self: FakeLLM, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        if len(FakeLLM.instances) == 1:
            self.during = press

    monkeypatch.setattr(FakeLLM, "__init__", interrupted)
    result = run(runner, files, "--max-tokens", "4")
    if stop_after < len(REQUESTS):
        assert result.exit_code == 130
        assert f"interrupted: {stop_after} of 11 lines are kept in" in result.stderr
        assert not files[1].exists()
        result = run(runner, files, "--max-tokens", "4")
        assert len(fake_llm[0].asked) + len(fake_llm[1].asked) == len(REQUESTS)  # nothing is computed twice
    assert result.exit_code == 0, result.output
    again = files[0].parent / "again.jsonl"
    assert run(runner, (files[0], again), "--max-tokens", "4").exit_code == 0
    assert again.read_bytes() == files[1].read_bytes()


def test_a_run_killed_before_the_rename_needs_no_model(
    runner: CliRunner, fake_llm: list[FakeLLM], files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenkit.cli.journal import Journal

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self, output: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(runner, files).exit_code == 130
    assert run(runner, files).exit_code == 0
    assert len(fake_llm) == 1
    assert len(read(files[1])) == len(REQUESTS)


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (lambda files: files[0].write_text('{"prompt": "other"}\n'), (), "begun with other input:"),
        (lambda files: None, ("--temperature", "1"), "begun with other sampling:"),
    ],
)
def test_what_changed_between_runs_is_refused(
    runner: CliRunner,
    fake_llm: list[FakeLLM],
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    flags: tuple[str, ...],
    said: str,
) -> None:
    from qwenkit.cli.journal import Journal

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self, output: (_ for _ in ()).throw(KeyboardInterrupt))
        run(runner, files)
    change(files)
    result = run(runner, files, *flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_output_is_not_overwritten_unasked(
    runner: CliRunner, fake_llm: list[FakeLLM], files: tuple[Path, Path]
) -> None:
    files[1].write_text("precious")
    result = run(runner, files)
    assert result.exit_code == 2
    assert "is there already; --overwrite replaces it" in result.stderr
    assert files[1].read_text() == "precious"
    assert run(runner, files, "--overwrite").exit_code == 0
    assert len(read(files[1])) == len(REQUESTS)
    result = run(runner, (files[0], files[0]), "--overwrite")
    assert (result.exit_code, "is the input itself" in result.stderr) == (2, True)


BAD_LINES = [
    ("{", "this is no JSON: .* at column 2"),
    ("7", "a request is an object such as .*, given was int"),
    ("{}", "either prompt .* or messages"),
    ('{"prompt": "a", "messages": []}', "either prompt .* or messages"),
    ('{"prompt": ["a"]}', r"prompt is \['a'\], allowed is a text"),
    ('{"prompt": ""}', "prompt is '', allowed is a text"),
    ('{"messages": []}', "messages is a list of objects"),
    ('{"messages": [{"content": "x"}]}', "messages is a list of objects"),
    ('{"messages": [{"role": "king", "content": "x"}]}', "refuses the role 'king'"),
    ('{"prompt": "a", "temprature": 1}', "'temprature' is no field of a request; did you mean temperature?"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature is 'hot', allowed is a number"),
    ('{"prompt": "a", "temperature": -1}', "temperature is -1, allowed is a number of at least 0"),
    ('{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
    ('{"prompt": "a", "top_p": 1e999}', "top_p is inf, allowed"),
    ('{"prompt": "a", "n": null}', "n is None, allowed is a whole number"),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0, allowed"),
    ('{"prompt": "a", "id": [1]}', r"id is \[1\], allowed is a text or a whole number"),
    ('{"prompt": "a", "id": "\\ud800"}', "half a surrogate pair"),
    ('{"prompt": "a", "tools": [{}]}', "tools go with messages"),
    ('{"messages": [{"role": "user", "content": "a"}], "tools": "x"}', "tools is a list of objects"),
    (f'{{"prompt": "{"a " * 50}"}}', "50 tokens long, but the context for prompt and answer is 40 tokens"),
    ('{"prompt": "a", "logit_bias": {"1000": 1}}', "logit_bias has token id 1000, allowed are 0 to 999"),
    ('{"prompt": "a", "stop_token_ids": [4000]}', "stop_token_ids has token id 4000, allowed are 0 to 999"),
    ("[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_nothing_is_written(
    runner: CliRunner, fake_llm: list[FakeLLM], tmp_path: Path, line: str, said: str
) -> None:
    source = tmp_path / "in"
    source.write_text('{"prompt": "good"}\n\n' + line + "\n")
    result = run(runner, (source, tmp_path / "out"))
    assert result.exit_code == 2
    with pytest.raises(ValueError, match=said):
        raise ValueError(result.stderr)
    assert result.stderr.startswith("error: line 3: ")
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bytes_that_are_no_text(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b'{"prompt": "\xff"}\n')
    result = run(runner, (tmp_path / "in", tmp_path / "out"))
    assert (result.exit_code, result.stderr) == (2, "error: line 1: byte 13 is not UTF-8 text\n")


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("absent", "out", "no such file or directory"),
        ("in", "no/where/out", "there is no folder"),
        ("in", ".", "which is a folder"),
        ("empty", "out", "--input holds no requests"),
    ],
)
def test_files_that_cannot_be(runner: CliRunner, tmp_path: Path, source: str, target: str, said: str) -> None:
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    (tmp_path / "empty").write_text("\n \n")
    result = run(runner, (tmp_path / source, tmp_path / target))
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_flags_out_of_range_and_absent_model(
    runner: CliRunner, fake_llm: list[FakeLLM], files: tuple[Path, Path]
) -> None:
    result = run(runner, files, "--top-p", "2")
    assert (result.exit_code, result.stderr) == (2, "error: top_p is 2.0, allowed is a number above 0 and up to 1\n")
    result = run(runner, files, "--kv-memory", "lots")
    assert (result.exit_code, "kv_memory is 'lots'" in result.stderr) == (2, True)
    args = ["generate", "absent", "--input", str(files[0]), "--output", str(files[1])]
    assert runner.invoke(cli, args).exit_code == 2
    assert not files[1].with_name("out.jsonl.partial").exists()


@given(st.binary(max_size=60))
def test_any_bytes_are_a_job_or_one_sentence(data: bytes) -> None:
    try:
        line = f"line {read_job(5, data, {}).line}: "
    except ValueError as error:
        line = str(error)
    assert line.startswith("line 5: ")


def test_logprobs_are_written_as_objects() -> None:
    token = TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.5)))
    output = RequestOutput([1, 2], [Completion(0, "x", [7], "stop", logprobs=[token])], prompt_logprobs=[None, token])
    record = as_record(Job(1, "a", SamplingParams(logprobs=2, prompt_logprobs=1)), output)
    written = {"token_id": 7, "logprob": -0.5, "top": [[7, -0.5], [8, -1.5]]}
    assert json.loads(json.dumps(record)) == {
        "line": 1,
        "text": "x",
        "finish_reason": "stop",
        "logprobs": [written],
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "prompt_logprobs": [None, written],
    }


def test_a_line_may_say_what_its_answer_looks_like(runner: CliRunner, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    grammars: list[dict[str, Any]] = [
        {"kind": "choice", "source": ["yes", "no"]},
        {"kind": "json_schema", "source": {"enum": [3, None]}},
        {"kind": "regex", "source": "[0-9]{3}"},
    ]
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(json.dumps({"prompt": "a", "grammar": grammar}) + "\n" for grammar in grammars))
    args = ["generate", str(model), "--input", str(source), "--output", str(target), "--max-model-len", "64"]
    result = runner.invoke(cli, args)
    assert result.exit_code == 0, result.output
    texts = [answer["text"] for answer in read(target)]
    assert texts[0] in ("yes", "no")
    assert texts[1] in ("3", "null")
    assert re.fullmatch("[0-9]{3}", texts[2])
    for wrong, said in (
        ({"kind": "xml"}, "line 2: grammar has the kind 'xml'"),
        ({"kind": "regex", "source": "("}, "line 2: grammar has a pattern that is not valid: unclosed group"),
        ("json", "line 2: grammar is an object such as"),
    ):
        source.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "a", "grammar": wrong}) + "\n")
        result = runner.invoke(cli, [*args, "--overwrite"])
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_an_answer_that_failed_says_why() -> None:
    output = RequestOutput([1, 2], [Completion(0, "x", [7], "error", error="the logits are not finite")])
    record = as_record(Job(1, "a", SamplingParams()), output)
    assert (record["text"], record["finish_reason"], record["error"]) == ("x", "error", "the logits are not finite")
    assert "error" not in as_record(
        Job(1, "a", SamplingParams()), RequestOutput([1], [Completion(0, "x", [7], "stop")])
    )
