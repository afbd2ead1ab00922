"""Calls in XML: values get the types of the schema, nothing is lost, and what is no call is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwenkit.text.xml_calls import xml_calls

SCHEMA = {
    "properties": {
        "count": {"type": "integer"},
        "size": {"type": "number"},
        "flag": {"type": ["boolean", "null"]},
        "names": {"type": "array"},
        "text": {"type": "string"},
    }
}


def written(**values: str) -> str:
    parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    return f"<function=f>\n{parameters}</function>"


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("count", "7", 7),
        ("count", "7.5", "7.5"),
        ("size", "7", 7),
        ("size", "1e3", 1000.0),
        ("size", "1e999", "1e999"),
        ("flag", "True", True),
        ("flag", "None", None),
        ("names", '["x", 1]', ["x", 1]),
        ("names", "x, y", "x, y"),
        ("text", "7", "7"),
        ("text", "a </parameter> b", "a </parameter> b"),
        ("other", "true", "true"),
    ],
)
def test_values(name: str, value: str, read: Any) -> None:
    (call,) = xml_calls(written(**{name: value}), {"f": SCHEMA}) or ()
    assert call.name == "f"
    assert json.loads(call.arguments) == {name: read}


@pytest.mark.parametrize(
    "body",
    [
        "",
        "x",
        "<function=f>",
        "<function=f>\n<parameter=a>\n1\n</function>",
        "<function=>\n</function>",
        written(a="1") + " x",
    ],
)
def test_no_call(body: str) -> None:
    assert xml_calls(body, {}) is None


def test_several_calls() -> None:
    calls = xml_calls(written(count="1") + "\n" + written(count="2"), {"f": SCHEMA}) or ()
    assert [json.loads(call.arguments)["count"] for call in calls] == [1, 2]
