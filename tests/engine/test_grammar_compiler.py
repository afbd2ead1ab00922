"""Grammars compiled on trial: verdicts, limits, and processes that end when they should."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from qwenkit.engine.grammar import Grammar
from qwenkit.engine.grammar_compiler import GrammarBusyError, GrammarCompiler
from qwenkit.engine.matcher import Grammars
from qwenkit.text.tokenizer import Tokenizer
from tests.tiny_models import VOCAB_SIZE

GOOD = Grammar("regex", "[a-z]+")
BOMB = Grammar("json_schema", '{"type": "integer", "multipleOf": 999983}')  # ten seconds and hundreds of megabytes


@pytest.fixture
def compiler(tokenizer: Tokenizer) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, timeout=60.0)
    compiler.start()
    yield compiler
    compiler.close()


def children(pid: int | str = "self") -> set[int]:
    """Children of a process, those that ended and were not waited for included."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def test_verdicts(compiler: GrammarCompiler) -> None:
    compiler.check(GOOD)
    compiler.check(Grammar("json_object"))
    compiler.check(Grammar("choice", '["<|im_end|>", "b"]'))
    compiler.check(Grammar("lark", 'start: <|im_start|> "a"'))
    for _ in range(2):  # the second time from memory
        with pytest.raises(ValueError, match="keyword not, which is not supported"):
            compiler.check(Grammar("json_schema", '{"not": {}}'))
    with pytest.raises(ValueError, match="unclosed group"):
        compiler.check(Grammar("regex", "("))
    compiler.check(GOOD)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts processes by /proc")
def test_a_bomb_is_stopped_in_time_and_leaves_nothing(tokenizer: Tokenizer) -> None:
    before = children()
    with closing(GrammarCompiler(tokenizer, timeout=2.0)) as compiler:
        compiler.check(GOOD)
        (worker,) = children() - before
        with pytest.raises(ValueError, match=r"longer to compile than the 2 seconds allowed"):
            compiler.check(BOMB)
        assert children(worker) == set(), "the fork that compiled it has ended"
        compiler.check(Grammar("regex", "[0-9]+"))
        assert children() - before == {worker}, "nothing had to be started again"
        with pytest.raises(ValueError, match="seconds allowed"):
            compiler.check(BOMB)
        assert children() - before == {worker}, "a verdict is remembered, a bomb costs its time and a process once"
    compiler.close()
    assert children() == before
    with pytest.raises(ValueError, match="the compiler is closed"):
        compiler.check(Grammar("regex", "x"))


def test_memory_is_limited(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, timeout=60.0, max_memory=32 << 20)
    try:
        with pytest.raises(ValueError, match="needs more memory to compile than the 32 MiB allowed"):
            compiler.check(BOMB)
        compiler.check(GOOD)
    finally:
        compiler.close()


def test_a_compiled_grammar_may_not_be_large(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, timeout=60.0, max_memory=96 << 20)
    try:
        with pytest.raises(ValueError, match=r"takes \d+ MiB of memory once compiled, allowed are at most 24 MiB"):
            compiler.check(Grammar("json_schema", '{"type": "integer", "multipleOf": 99991}'))
    finally:
        compiler.close()


def test_the_source_is_limited(compiler: GrammarCompiler) -> None:
    with pytest.raises(ValueError, match="grammar is 65537 bytes long, allowed are at most 65536"):
        compiler.check(Grammar("regex", "a" * 65_537))
    with pytest.raises(ValueError, match="65538 bytes long"):
        compiler.check(Grammar("regex", "\u00e9" * 32_769))


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(" * 30_000 + ")" * 30_000),
        Grammar("lark", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
        Grammar("lark", "start: %json " + '{"items":' * 7_000 + "{}" + "}" * 7_000),
        Grammar("lark", "start: %json " + "[" * 60_000),
    ],
    ids=["regex", "lark", "schema", "json"],
)
def test_deep_nesting_is_refused_and_the_next_grammar_works(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(ValueError, match=r"^grammar"):
        compiler.check(grammar)
    compiler.check(GOOD)


def test_a_worker_that_died_is_replaced(compiler: GrammarCompiler) -> None:
    assert compiler._worker.pid is not None
    os.kill(compiler._worker.pid, signal.SIGKILL)
    compiler.check(GOOD)


def test_many_threads_get_their_own_verdicts(compiler: GrammarCompiler) -> None:
    verdicts: dict[int, str | None] = {}

    def check(place: int) -> None:
        try:
            compiler.check(Grammar("regex", f"a{{{place}}}" + "(" * (place % 2)))
            verdicts[place] = None
        except ValueError as error:
            verdicts[place] = str(error)

    threads = [threading.Thread(target=check, args=(place,)) for place in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [place for place in range(12) if verdicts[place] is None] == [0, 2, 4, 6, 8, 10]


def test_waiting_has_an_end(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, timeout=60.0, max_wait=0.2)
    compiler.start()
    try:
        bomb = compiler.submit(BOMB, "a")
        for check in (compiler.check, lambda *args: asyncio.run(compiler.check_async(*args))):
            with pytest.raises(GrammarBusyError, match=r"waited 0\.2 seconds for others to be compiled"):
                check(GOOD, "a")
        assert not bomb.done()
        compiler.check(GOOD, "b")
    finally:
        compiler.close()
    with pytest.raises(ValueError, match="the compiler is closed"):
        bomb.result(20)


def test_a_principal_has_only_its_share(tokenizer: Tokenizer) -> None:
    """Seven expensive grammars of two principals each: a third one's is answered before the second bomb has begun."""
    compiler = GrammarCompiler(tokenizer, timeout=60.0)
    compiler.start()
    try:
        bombs = [
            compiler.submit(
                Grammar("json_schema", json.dumps({"type": "integer", "multipleOf": 999_983 - 2 * place})), name
            )
            for place in range(7)
            for name in ("a", "b")
        ]
        compiler.check(Grammar("regex", "[ab]{3}"), "c")
        asyncio.run(compiler.check_async(Grammar("regex", "[ab]{4}"), "c"))
        assert not any(bomb.done() for bomb in bombs)
        assert sum(bomb.running() for bomb in bombs) == 2
    finally:
        compiler.close()


def test_a_cancelled_check_leaves_the_queue(tokenizer: Tokenizer) -> None:
    async def cancel() -> None:
        waiting = asyncio.create_task(compiler.check_async(GOOD, "a"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    compiler = GrammarCompiler(tokenizer, timeout=2.0)
    compiler.start()
    try:
        compiler.submit(BOMB, "a")
        asyncio.run(cancel())
        ((_, future),) = compiler._queues["a"]
        assert future.cancelled()
    finally:
        compiler.close()


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("regex", "(a|aa|aaa|aaaa){1000}b"), "too many expressions"),
        (Grammar("regex", "x{1000000}"), "too many expressions"),
        (Grammar("regex", "x{200000}"), "ms for each token, allowed are at most 10"),
        (Grammar("lark", "start: " + " | ".join(f'"{number}"' for number in range(10_000, 12_001))), "2002 items"),
    ],
    ids=["alternatives", "repeat", "slow", "rules"],
)
def test_what_fails_at_the_first_tokens_fails_on_trial(tokenizer: Tokenizer, grammar: Grammar, reason: str) -> None:
    """All of them compile; the engine would fail when the answer begins."""
    compiler = GrammarCompiler(tokenizer, timeout=20)
    with closing(compiler), pytest.raises(ValueError, match=f"grammar .*{reason}"):
        compiler.check(grammar)


def test_thousands_of_choices_are_one_automaton(compiler: GrammarCompiler) -> None:
    compiler.check(Grammar("choice", json.dumps([str(number) for number in range(10_000, 16_000)])))


def test_what_passed_is_compiled_for_the_engine(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE)
    compiler = GrammarCompiler(tokenizer, grammars=grammars)
    try:
        compiler.check(GOOD)
        with pytest.raises(ValueError, match="unclosed"):
            compiler.check(Grammar("regex", "("))
    finally:
        compiler.close()
    assert list(grammars._compiled) == [GOOD]


def test_the_worker_is_light_and_knows_no_secrets(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, qwenkit.engine.grammar_worker; sys.exit(bool({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setenv("QWENKIT_API_KEY", "secret")
    compiler = GrammarCompiler(tokenizer)
    try:
        compiler.start()
        environment = Path(f"/proc/{compiler._worker.pid}/environ")
        if environment.exists():
            assert b"secret" not in environment.read_bytes()
    finally:
        compiler.close()


def test_a_worker_ends_with_its_parent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qwenkit.engine.grammar_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.communicate(b"", timeout=60)
    assert process.returncode == 0
