"""Flags, names and JSON keys that come from one dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qwenkit.cli.options import Verb, dataclass_options, flags_of, given
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.sampling import SamplingParams
from qwenkit.settings import nearest


@dataclass(frozen=True)
class Recipe:
    amount: float | None = field(default=None, metadata={"help": "how much"})
    count: int = field(default=3, metadata={"help": "how many"})
    name: str = field(default="soup", metadata={"help": "what"})
    hot: bool = field(default=True, metadata={"help": "warm it"})
    spices: tuple[str, ...] = field(default=(), metadata={"help": "several"})
    steps: tuple[int, ...] = field(default=(), metadata={"help": "several numbers"})
    taste: Mapping[int, float] = field(default=(), metadata={"help": "pairs"})  # type: ignore[assignment]


FLAGS = flags_of(Recipe)


@click.command(cls=Verb)
@click.option("--plain", is_flag=True)
@dataclass_options(Recipe, "Cooking", exclude=("name",))
def cook(plain: bool, **values: Any) -> None:
    click.echo(repr(given(Recipe, values)))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {}),
        (["--amount", "0"], {"amount": 0.0}),
        (["--count", "0", "--no-hot"], {"count": 0, "hot": False}),
        (["--hot", "--spices", "a b", "--spices", "c"], {"hot": True, "spices": ("a b", "c")}),
        (["--steps", "1", "--steps", "-2"], {"steps": (1, -2)}),
        (["--taste", "5=-1.5", "--taste", "7=2"], {"taste": {5: -1.5, 7: 2.0}}),
    ],
)
def test_only_what_was_given_arrives(runner: CliRunner, args: list[str], expected: dict[str, Any]) -> None:
    result = runner.invoke(cook, args)
    assert result.output == repr(expected) + "\n"
    Recipe(**expected)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--amount", "much"], "amount is 'much', allowed is a number"),
        (["--count", "1.5"], "count is '1.5', allowed is a whole number"),
        (["--taste", "5"], "taste is '5', allowed is ID=BIAS"),
        (["--taste", "x=1"], "taste is 'x=1', allowed is ID=BIAS"),
        (["--name", "stew"], "No such option '--name'"),
    ],
)
def test_wrong_types_are_usage_errors(runner: CliRunner, args: list[str], said: str) -> None:
    result = runner.invoke(cook, args)
    assert result.exit_code == 2
    assert said in result.stderr


def test_help_has_sections_defaults_and_no_excluded_flag(runner: CliRunner) -> None:
    text = runner.invoke(cook, ["--help"]).output
    assert text.index("Options:") < text.index("--plain") < text.index("Cooking:") < text.index("--amount")
    assert "--hot / --no-hot" in text
    assert "warm it  [default: on]" in text
    assert "how many  [default: 3]" in text
    assert "--name" not in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("amount", None, None),
        ("amount", 2, 2),
        ("amount", 0.5, 0.5),
        ("spices", "a", ("a",)),
        ("spices", ["a", "b"], ("a", "b")),
        ("steps", [1, 2], (1, 2)),
        ("taste", {"3": 1, "4": -0.5}, {3: 1.0, 4: -0.5}),
        ("hot", False, False),
    ],
)
def test_json_values(name: str, value: Any, expected: Any) -> None:
    assert FLAGS[name].read_json(value) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("amount", "1"),
        ("amount", True),
        ("count", None),
        ("count", 1.0),
        ("hot", 1),
        ("spices", [1]),
        ("spices", {"a": 1}),
        ("steps", "12"),
        ("steps", [True]),
        ("taste", {"a": 1}),
        ("taste", {"1": "x"}),
        ("taste", [1]),
    ],
)
def test_json_values_of_a_wrong_type_name_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*, allowed is ") as caught:
        FLAGS[name].read_json(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("on", True), ("False", False), ("yes", True), ("0", False)])
def test_switches(text: str, value: bool) -> None:
    assert FLAGS["hot"].parse(text) is value


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
def test_every_field_of_the_engine_has_a_flag_and_a_help(cls: type) -> None:
    flags = flags_of(cls)
    assert list(flags) == [one.name for one in fields(cls) if one.name not in ("grammar", "grammar_after")]
    assert all(flag.help for flag in flags.values())


def test_nearest() -> None:
    assert nearest("temprature", FLAGS | {"temperature": FLAGS["amount"]}) == "did you mean temperature?"
    assert nearest("zzz", ["a", "b"]) == "known are a, b"
