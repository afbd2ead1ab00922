"""Sizes: one parser, one meaning of each unit, and an error that names the field that was given."""

import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.engine.config import EngineConfig
from qwenkit.serve.config import ServeConfig
from qwenkit.settings import nearest, parse_size
from tests.conftest import ROOT

UNITS = {
    **{"": 1, "B": 1, "K": 2**10, "KiB": 2**10, "KB": 10**3, "M": 2**20, "MiB": 2**20, "MB": 10**6},
    **{"G": 2**30, "GiB": 2**30, "GB": 10**9, "T": 2**40, "TiB": 2**40, "TB": 10**12},
}


@given(
    number=st.decimals(min_value=Decimal("0.001"), max_value=10**6, places=3),
    unit=st.sampled_from(sorted(UNITS)),
    space=st.sampled_from(["", " "]),
    lower=st.booleans(),
)
def test_every_unit(number: Decimal, unit: str, space: str, lower: bool) -> None:
    text = f"{number}{space}{unit.lower() if lower else unit}"
    size = int(number * UNITS[unit])
    if size:
        assert parse_size("field", text) == size
    else:
        with pytest.raises(ValueError, match=r"^field is "):
            parse_size("field", text)


def test_a_plain_number_is_of_the_unit_that_the_field_has() -> None:
    assert parse_size("kv_memory", 7) == 7
    assert parse_size("export_size", 2, unit="GB") == 2 * 10**9
    assert parse_size("export_size", "1.5", unit="GB") == 15 * 10**8
    assert parse_size("export_size", 0.5, unit="GB") == 5 * 10**8
    assert parse_size("export_size", "500 MiB", unit="GB") == 500 * 2**20


BAD = [
    "",
    "0",
    "0GB",
    "GiB",
    "2 GiBs",
    "-1",
    "two",
    "1e3",
    "nan",
    "inf",
    "\u0661GB",
    "9" * 400,
    "9" * 29,
    True,
    None,
    [2],
    1e30,
]


@pytest.mark.parametrize("bad", BAD, ids=repr)
@pytest.mark.parametrize(("unit", "plain"), [("B", "a number of bytes"), ("GB", "a number of GB")])
def test_the_error_names_field_given_and_allowed(bad: object, unit: str, plain: str) -> None:
    sentence = f"shard_size is {bad!r}, allowed is a size such as 2GiB (G means GiB), or {plain}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        parse_size("shard_size", bad, unit=unit)


@pytest.mark.parametrize("field", ["max_body", "max_file", "max_grammar", "state_disk", "state_disk_per_key"])
def test_sizes_of_a_server(field: str) -> None:
    assert ServeConfig(**{field: "2G"}).bytes_of(field) == 2**31
    with pytest.raises(ValueError, match=f"^{field} is 'kv_memory', allowed is a size such as "):
        ServeConfig(**{field: "kv_memory"})


def test_sizes_of_the_engine() -> None:
    with pytest.raises(ValueError, match=r"^kv_memory is '0', allowed is a size such as "):
        EngineConfig(kv_memory="0")


def test_there_is_one_parser() -> None:
    """No other file of the package spells out the units of sizes."""
    files = (ROOT / "src" / "qwenkit").rglob("*.py")
    found = [path.name for path in files if re.search(r"1024\s*\*\*\s*power|\"IB\"|'IB'", path.read_text("utf-8"))]
    assert found == [Path("settings.py").name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("serv", "did you mean serve?"),
        ("tarin", "did you mean train?"),
        ("x", "known are serve, train, eval"),
        ("bench", "known are serve, train, eval"),
        ("learning", "known are serve, train, eval"),
    ],
)
def test_only_what_is_near_is_suggested(name: str, said: str) -> None:
    assert nearest(name, ["serve", "train", "eval"]) == said
