"""Schemas in words that a grammar obeys: closed objects, null, older words; nothing is dropped in silence."""

from __future__ import annotations

from typing import Any

import pytest

from qwenkit.text.json_schema import normalized

ZOD = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "additionalProperties": False}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        (
            {"properties": {"a": {"type": "string", "nullable": True}}},
            {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}, "additionalProperties": False},
        ),
        ({"minimum": 3, "exclusiveMinimum": True}, {"exclusiveMinimum": 3}),
        ({"format": "email", "pattern": ZOD}, {"format": "email"}),
        ({"format": "email", "pattern": "^(?!admin).*$"}, {"format": "email", "pattern": "^(?!admin).*$"}),
        ({"pattern": ZOD}, {"pattern": ZOD}),
        (True, True),
    ],
)
def test_normalized(given: Any, taken: Any) -> None:
    assert normalized(given) == taken


def test_a_word_that_nobody_obeys_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"the word extends at properties\.a"):
        normalized({"properties": {"a": {"extends": {}}}})
