"""Reading bodies: one strict parser, what is counted before it, and how many errors a body can make."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from qwenkit.serve import adapters, body
from qwenkit.serve.api import messages_protocol, protocol, responses_protocol
from qwenkit.serve.batch import batches
from qwenkit.serve.body import MAX_FIELDS, MIN_VALUES, LeftOut, RequestModel, count_structure, strict_json
from qwenkit.serve.errors import ApiError, refusal
from qwenkit.serve.executor import FairExecutor
from qwenkit.serve.page import page

MODELS = [
    model
    for module in (protocol, messages_protocol, responses_protocol, adapters, batches, page)
    for model in vars(module).values()
    if isinstance(model, type) and issubclass(model, RequestModel) and model is not RequestModel
]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('a\\",:[]{}é\n'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\[{:,'), inner, max_size=4),
    max_leaves=30,
)


def structure(value: Any) -> tuple[int, int]:
    """(commas, colons and opening brackets) of a value's JSON text."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [structure(item) for item in (value.values() if isinstance(value, dict) else value)]
    commas = max(len(value) - 1, 0) + sum(commas for commas, _ in inner)
    return commas, 1 + len(value) * isinstance(value, dict) + sum(fields for _, fields in inner)


@given(JSON, st.integers(1, 40), st.booleans())
def test_structure_is_counted_outside_of_strings(value: Any, chunk: int, ascii_only: bool) -> None:
    data = json.dumps(value, ensure_ascii=ascii_only).encode()
    before, body._CHUNK = body._CHUNK, chunk
    try:
        limits = (structure(value)[0], structure(value)[1])
        counted = count_structure(data, *limits)
    finally:
        body._CHUNK = before
    if counted != (data.count(b","), sum(map(data.count, (b":", b"[", b"{")))):
        assert counted == structure(value)
    else:
        assert counted >= structure(value) or counted == structure(value)
    assert all(given <= limit for given, limit in zip(counted, limits, strict=True)), "what is allowed is not refused"


@given(JSON)
def test_the_parser_reads_what_json_has(value: Any) -> None:
    assert strict_json(json.dumps(value).encode(), MIN_VALUES) == value
    assert strict_json(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode(), MIN_VALUES) == value


@pytest.mark.parametrize(
    "data",
    [b"NaN", b"[Infinity]", b'{"a": -Infinity}', b'"\\ud800"', b'["\\udc00\\ud800"]', b'{"\\udfff": 1}', b"[" * 300, b"9" * 5000,
     b"{'a': 1}", b"[1,]", b'{"a": 1} 2', b'"\xed\xa0\x80"', b"\xff", b'"\x00"', b""],
)  # fmt: skip
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        strict_json(data, MIN_VALUES)
    assert (caught.value.status, caught.value.code) == (400, "bad_json")


def test_more_than_any_valid_request_has_is_refused_before_it_is_parsed() -> None:
    for data in (b"[" + b"{}," * MAX_FIELDS + b"1]", b"{" + b",".join(b'"%x":1' % n for n in range(MAX_FIELDS)) + b"}"):
        with pytest.raises(ApiError, match="more than 100000 fields"):
            strict_json(data, MIN_VALUES)
    with pytest.raises(ApiError, match="more than 200000 values"):
        strict_json(b"[" + b"1," * 200_001 + b"1]", 200_000)
    assert len(strict_json(b"[" + b"1," * 199_999 + b"1]", 200_000)) == 200_000
    text = '{[:,\\"' * 300_000
    assert strict_json(json.dumps([text]).encode(), 10) == [text], "characters in strings are no structure"


def test_every_list_of_a_request_stops_at_its_first_error() -> None:
    """However long a body is, it makes few errors: this holds for each list and dictionary of each model."""
    assert len(MODELS) > 50
    wrong: list[str] = []

    def walk(schema: Any, where: str) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "list" and not schema.get("fail_fast"):
                wrong.append(f"{where}: a list without fail_fast")
            is_typed = schema.get("type") == "dict" and schema.get("values_schema", {}).get("type") != "any"
            if is_typed and schema.get("max_length", 1 << 30) > 1024:
                wrong.append(f"{where}: a dictionary of any length")
            for name, value in schema.items():
                if name != "json_schema_input_schema":  # for the documentation only
                    walk(value, where)
        elif isinstance(schema, list | tuple):
            for value in schema:
                walk(value, where)

    for model in MODELS:
        walk(model.__pydantic_core_schema__, model.__name__)
    assert not wrong, wrong


def test_unknown_fields_are_named_up_to_a_number() -> None:
    body = {"prompt": "a"} | {f"odd{number}": number for number in range(5000)}
    left_out = LeftOut(strict=True)
    protocol.CompletionRequest.simplify(body, left_out)
    assert left_out.header().startswith("odd0, odd1, odd10, ")
    assert left_out.header().endswith(", ...")
    assert len(left_out.header()) < 300
    with pytest.raises(ApiError, match="unknown fields: odd0, odd1, odd10, ") as caught:
        left_out.check()
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "odd0")
    assert len(caught.value.message) < 300


def refused_as_a_whole(model: type[BaseModel], value: Any) -> bool:
    """Whether a model without required fields says that the fields contradict each other."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        return all(not one["loc"] for one in error.errors())
    return False


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.__module__.rpartition('.')[2]}.{model.__name__}")
def test_nulls_are_missing_and_unknown_fields_no_error(model: type[BaseModel]) -> None:
    for odd in ({}, dict.fromkeys(model.model_fields), {f"odd{number}": number for number in range(5000)}):
        required = {field.alias or name for name, field in model.model_fields.items() if field.is_required()}
        if required:
            with pytest.raises(ValidationError) as caught:
                model.model_validate(odd)
            assert {one["loc"][0] for one in caught.value.errors() if one["loc"]} <= required
        else:
            assert refused_as_a_whole(model, odd) or model.model_validate(odd)


def test_dictionaries_are_measured_before_they_are_read() -> None:
    for field in ("logit_bias",):
        request = {"messages": [{"role": "user", "content": "a"}], field: {str(n): "x" for n in range(5000)}}
        with pytest.raises(ValidationError) as caught:
            protocol.ChatRequest.model_validate(request)
        assert caught.value.error_count() == 1
        assert "at most" in refusal(caught.value.errors()).message


def test_what_was_given_is_shown_in_short() -> None:
    for value in (["x"] * 100_000, {str(n): n for n in range(100_000)}, "x" * 100_000, [[["x"] * 1000] * 1000]):
        with pytest.raises(ValidationError) as caught:
            protocol.DetokenizeRequest.model_validate({"tokens": [value]})
        assert len(refusal(caught.value.errors()).message) < 200


def test_keys_take_turns() -> None:
    async def run() -> list[str]:
        executor, order, gate = FairExecutor(1, "test"), [], threading.Event()

        def job(name: str) -> str:
            assert gate.wait(10)
            order.append(name)
            return name

        tasks = [asyncio.create_task(executor.run("a", job, f"a{n}")) for n in range(5)]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(executor.run(key, job, f"{key}{n}")) for key in "bc" for n in range(2)]
        await asyncio.sleep(0.01)
        assert executor.num_waiting("a") == 4
        tasks[3].cancel()
        gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [name for name in results if isinstance(name, str)] == ["a0", "a1", "a2", "a4", "b0", "b1", "c0", "c1"]
        with pytest.raises(ZeroDivisionError):
            await executor.run("a", lambda: 1 // 0)
        assert await executor.run("a", job, "last") == "last"
        executor.close()
        return order

    order = asyncio.run(run())
    assert order[:6] == ["a0", "a1", "b0", "c0", "a2", "b1"]
    assert "a3" not in order, "it was cancelled before its turn"
