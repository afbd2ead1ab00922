"""`qwenkit chat` with a scripted model: one answer on standard output, what is piped in, and flags that make no sense."""

import sys
from typing import Any

import pytest
from click.testing import CliRunner

from qwenkit.cli import chat as chat_module
from qwenkit.cli.conversation.state import Conversation
from qwenkit.cli.main import cli
from qwenkit.engine.sampling import SamplingParams
from tests.cli.conftest import FakeLLM


def expected(llm: FakeLLM, prompt: str, params: SamplingParams | None = None) -> str:
    return " ".join(llm.answer(llm.encode(prompt), params)[0])


def test_one_answer_and_nothing_else_on_stdout(runner: CliRunner, fake_llm: list[FakeLLM]) -> None:
    args = ["chat", "tiny", "What is it?", "--temperature", "0", "--max-tokens", "4", "--system", "be brief"]
    result = runner.invoke(cli, [*args, "--kv-memory", "1GiB", "--no-prefix-cache"])
    assert result.exit_code == 0, result.output
    llm = fake_llm[0]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "What is it?"}]
    params = SamplingParams(temperature=0, max_tokens=4)
    assert llm.asked == [(messages, params)]
    assert result.stdout == expected(llm, "be brief What is it?", params) + "\n"
    assert result.stderr == ""
    assert llm.config is not None
    assert (llm.config.kv_memory, llm.config.prefix_cache) == ("1GiB", False)


@pytest.mark.parametrize(
    ("args", "piped", "asked"),
    [
        (["tiny", "look:"], "some text\n", "look:\n\nsome text\n"),
        (["tiny"], "only 这个", "only 这个"),
        (["tiny", "only this"], "", "only this"),
        ([], "to the default model", "to the default model"),
    ],
)
def test_piped_text_goes_after_the_prompt(
    runner: CliRunner, fake_llm: list[FakeLLM], args: list[str], piped: str, asked: str
) -> None:
    result = runner.invoke(cli, ["chat", *args], input=piped)
    assert result.exit_code == 0, result.output
    assert fake_llm[0].asked[0][0] == [{"role": "user", "content": asked}]
    assert fake_llm[0].model_name == (args[0] if args else "smollm2")


def test_raw_continues_plain_text(runner: CliRunner, fake_llm: list[FakeLLM]) -> None:
    result = runner.invoke(cli, ["chat", "tiny", "Once upon a time", "--raw"])
    assert result.exit_code == 0
    assert fake_llm[0].asked[0][0] == "Once upon a time"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["tiny"], "nothing to answer: standard input is empty"),
        (["tiny", ""], "nothing to answer"),
        (["What is it?"], "'What is it?' is taken for MODEL"),
        (["tiny", "x", "--raw", "--system", "y"], "--raw goes without"),
        (["tiny", "x", "--api-key", "y"], "--api-key is for the server of --url"),
        (["x", "--url", "http://127.0.0.1:9", "--raw"], "--raw is for models that run here"),
        (
            ["x", "--url", "http://127.0.0.1:9", "--max-num-seqs", "1"],
            "--max-num-seqs is for models that run here",
        ),
        (["m", "x", "--url", "http://127.0.0.1:9"], "--model names the model"),
        (["m", "x", "--model", "tiny"], "--model names the model"),
        (["tiny", "x", "--temperature", "-1"], "error: temperature is -1.0, allowed is a number of at least 0"),
        (["tiny", "x", "--dtype", "int3"], "error: dtype is 'int3', allowed are auto"),
        (["tiny", "x", "--n", "2"], "No such option '--n'"),
        (["tiny", "word " * 50], "error: prompt is 50 tokens long, but the context for prompt and answer is 40 tokens"),
        (["absent", "x"], "error: there is no file or folder 'absent'"),
        (["tiny", "x", "y"], "unexpected extra argument"),
        (["tiny", "bad \udcff byte"], "error: PROMPT holds bytes that are not UTF-8 text"),
    ],
)
def test_bad_input_is_one_sentence(runner: CliRunner, fake_llm: list[FakeLLM], args: list[str], said: str) -> None:
    result = runner.invoke(cli, ["chat", *args])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert said.startswith("error") == (len(result.stderr.splitlines()) == 1)


def test_piped_bytes_that_are_no_text(runner: CliRunner, fake_llm: list[FakeLLM]) -> None:
    result = runner.invoke(cli, ["chat", "tiny"], input=b"ab\xff")
    assert (result.exit_code, result.stderr) == (2, "error: standard input is not UTF-8 text (byte 3)\n")


def test_a_conversation_needs_a_terminal(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "_whole_prompt", lambda prompt: prompt)  # as if standard input were a terminal
    result = runner.invoke(cli, ["chat", "tiny"])
    assert (result.exit_code, "needs a terminal on standard output" in result.stderr) == (2, True)
    result = runner.invoke(cli, ["chat", "tiny", "--raw"])
    assert (result.exit_code, "--raw continues one text" in result.stderr) == (2, True)


def test_at_a_terminal_a_conversation_begins(
    runner: CliRunner, fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Conversation] = []
    monkeypatch.setattr(chat_module, "_whole_prompt", lambda prompt: prompt)
    monkeypatch.setattr(chat_module, "_converse", met.append)

    def invoke(self: Any, ctx: Any, original: Any = chat_module.chat.invoke) -> Any:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return original(ctx)

    monkeypatch.setattr(type(chat_module.chat), "invoke", lambda self, ctx: invoke(self, ctx))
    result = runner.invoke(cli, ["chat", "tiny", "--system", "s", "--top-k", "3"])
    assert result.exit_code == 0, result.output
    assert (met[0].system, met[0].settings, met[0].talker.name) == ("s", {"top_k": 3}, "tiny")


def test_ctrl_c_ends_one_answer_with_130(
    runner: CliRunner, fake_llm: list[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: FakeLLM, ids: Any, params: Any) -> Any:
        yield from list(original(self, ids, params))[:2]
        raise KeyboardInterrupt

    original = FakeLLM._deltas
    monkeypatch.setattr(FakeLLM, "_deltas", answer)
    result = runner.invoke(cli, ["chat", "tiny", "x"])
    assert result.exit_code == 130
    assert len(result.stdout.split()) == 2
    assert result.stdout.endswith("\n")
