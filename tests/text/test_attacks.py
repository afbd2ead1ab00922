"""Templates and tokenizer files that were made to take all time or memory: one sentence each, soon, in little memory.

The cases are in tests/data/security/text.jsonl. They run in a process with limits (attacks.py), so that a regression
cannot take the machine along.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenkit.text.template import ChatTemplate, TemplateLimitError, compile_template
from qwenkit.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CASES: list[dict[str, Any]] = [
    json.loads(line) for line in (ROOT / "tests" / "data" / "security" / "text.jsonl").read_text("utf-8").splitlines()
]
SLOW = bool(os.environ.get("QWENKIT_SLOW"))
MAX_CPU_SECONDS = 4.0  # two are expected; machines differ
MAX_MEGABYTES = 200
ON_TRIAL = ("const-mult", "elif", "loops", "fib", "deep", "keep", "joinlist", "pad-by-length")

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc for the limits")


def attack(cases: list[dict[str, Any]], how: str) -> dict[str, tuple[str, float]]:
    """(what was raised, CPU seconds) for each case's id."""
    assert cases
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "text" / "attacks.py"), how],
        input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-500:] + process.stderr[-2000:]
    *lines, memory = process.stdout.splitlines()
    own, children = map(int, memory.split())
    assert own <= MAX_MEGABYTES
    assert children <= MAX_MEGABYTES
    assert "panicked" not in process.stderr, "the Rust libraries' own reports are not for users"
    found = {id: (raised, seconds) for id, raised, seconds in map(json.loads, lines)}
    assert len(found) == len(cases)
    return found


def check(found: dict[str, tuple[str, float]], beginning: str) -> None:
    wrong = {
        id: (raised[:200], seconds)
        for id, (raised, seconds) in found.items()
        if not raised.startswith((f"ValueError: {beginning}", f"TemplateLimitError: {beginning}"))
        or "\n" in raised
        or len(raised) > 600
        or seconds > MAX_CPU_SECONDS
    }
    assert not wrong


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [case for case in CASES if case["kind"] in kinds and (SLOW or not case.get("long"))]


def test_templates_are_stopped_in_this_process() -> None:
    check(attack(of_kind("template", "messages"), "here"), "the chat template ")


def test_templates_are_stopped_on_trial() -> None:
    cases = [case for case in CASES if case["id"].removeprefix("template-") in ON_TRIAL]
    assert len(cases) == len(ON_TRIAL)
    check(attack(cases, "trial"), "the chat template ")


@pytest.mark.skipif(not SLOW, reason="takes a minute; set QWENKIT_SLOW=1")
def test_all_templates_are_stopped_on_trial() -> None:
    check(attack(of_kind("template", "messages"), "trial"), "the chat template ")


def test_tokenizer_files_are_refused() -> None:
    found = attack(of_kind("tokenizer"), "trial")
    check({id: (raised.replace("/", "", 1), seconds) for id, (raised, seconds) in found.items()}, "")
    assert all("tokenizer.json: " in raised for raised, _ in found.values())


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        ({"type": "NFKC"}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
        ({"type": "Prepend", "prepend": "_"}, {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
    ],
    ids=["compatibility forms", "prefixes"],
)
def test_sound_steps_that_are_not_known_pass_their_trial(
    tmp_path: Path, normalizer: dict[str, Any], pre_tokenizer: dict[str, Any]
) -> None:
    from tokenizers import Tokenizer as Library

    from tests.text.attacks import byte_characters

    vocab = {character: id for id, character in enumerate(byte_characters())}
    data = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}, "normalizer": normalizer}
    data["pre_tokenizer"] = pre_tokenizer | {"trim_offsets": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    text = "It\u00bds \ufb01ne, 123.\n" * 3000  # longer than a chunk: it goes in whole
    library = Library.from_str(json.dumps(data))
    assert Tokenizer.from_folder(tmp_path).encode(text) == library.encode(text, add_special_tokens=False).ids


def test_a_trial_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenkit.text import template
    from qwenkit.text.chatml import NAMED

    tried: list[str] = []
    monkeypatch.setattr(template, "try_template", tried.append)
    for source in ("{{ messages[0].content }} once", *NAMED.values(), "{{ messages[0].content }} once"):
        ChatTemplate(source)
    assert tried == ["{{ messages[0].content }} once"]


def test_a_refused_template_is_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="the chat template makes a value of 10000000000 characters"):
            ChatTemplate("{{ 'a' * 10000000000 }}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'a' * 3 ~ 1 ~ none }}", "aaa1None"),
        ("{{ '%s: %5.1f%%' % ('x', 2.25) }}", "x:   2.2%"),
        ("{{ 'No. 1234567: {:>4}|{}'.format(5, [1]) }}", "No. 1234567:    5|[1]"),
        ("{{ range(5)|map('string')|map('center', 3)|join('-') }}", " 0 - 1 - 2 - 3 - 4 "),
        ("{{ {'b': 1, 'a': [1, {}]}|tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  1,\n  {}\n ]\n}'),
        ("{{ [3, 1, 2]|sort|last }}{{ (2 ** 10) % 7 }}{{ 7 // 2 }}{{ -7 / 2 }}", "323-3.5"),
        ("{{ 'b' in 'abc' and 4 not in [1, 2] and 1 < 2 <= 2 and 'k' in {'k': 1} }}", "True"),
        ("{{ 'a,b'.split(',')[-1].strip() }}{{ [1, 2, 3][1:] }}{{ 'abc'[::-1] }}", "b[2, 3]cba"),
        ("{{ [[1], [2, 3]]|sum(start=[]) }}{{ [1, 2, 2]|unique|list }}", "[1, 2, 3][1, 2]"),
        (
            "{% for a in [1, 2, 3] if a is odd %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}",
            "1/2False 2/2True ",
        ),
        ("{% for a in [1]|map('string') %}{{ loop.length }}{{ a }}{% else %}none{% endfor %}", "11"),
        ("{% for a in [[1, [2]]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}", "12"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}x{% endcall %}", "12x"),
        (
            "{% set ns = namespace(n=0, d={}) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("{% filter upper %}a{% endfilter %}{{ 'a\nb'|indent(2) }}{{ 'ab'|replace('a', 'c') }}", "Aa\n  bcb"),
        (
            "{{ {'items': 3}.items() | list }}{{ {'items': 3}['items'] }}{{ {'a': 1}.a }}{{ 'x'.nothing is defined }}",
            "[('items', 3)]31False",
        ),
        ("{% block b %}in{% endblock %}{{ self.b() }}", "inin"),
        ("{% autoescape true %}{{ '<' ~ '>' }}{% endautoescape %}{{ '<' }}", "&lt;&gt;<"),
    ],
    ids=str,
)
def test_ordinary_expressions_give_what_jinja2_gives(source: str, text: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    if "tojson" not in source:  # jinja2's own escapes for HTML
        assert plain.from_string(source).render() == text
    from qwenkit.text.template import render_template

    assert render_template(compile_template(source), {}) == text


def test_limits_grow_with_the_messages() -> None:
    content = "word " * 400_000
    source = "{% for m in messages %}{{ '<' + m.content.strip() + '>' }}{% endfor %}"
    from qwenkit.text.template import render_template

    template = compile_template(source)
    assert len(render_template(template, {"messages": [{"content": content}] * 8})) > 15_000_000
    with pytest.raises(TemplateLimitError, match="makes a value of 3000000 characters"):
        render_template(compile_template("{{ 'a' * 3000000 }}"), {"messages": []})
