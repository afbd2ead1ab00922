"""Input files: what is refused, with which lines, and where the others stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.serve.batch.lines import MAX_ERRORS, Scan, read_body, scan, usage
from tests.serve.batch.echo_app import URL, request_line


def scanned(path: Path, data: bytes, max_lines: int = 10, max_line_bytes: int = 500) -> Scan:
    path.write_bytes(data)
    return scan(path, URL, max_lines=max_lines, max_line_bytes=max_line_bytes)


def changed(**fields: Any) -> bytes:
    request = orjson.loads(request_line(1)) | fields
    return orjson.dumps({key: value for key, value in request.items() if value is not None}) + b"\n"


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"\n \n", "empty_file", None),
        (request_line(1) + b"{no json}\n", "invalid_json_line", 2),
        (request_line(1) + b"\n" + b"[1]", "invalid_json_line", 3),
        (b'{"custom_id":"\xff"}\n', "invalid_json_line", 1),
        (b"[" * 400, "invalid_json_line", 1),
        (request_line(1) + request_line(2) + request_line(1), "duplicate_custom_id", 3),
        (changed(custom_id=None), "invalid_custom_id", 1),
        (changed(custom_id=7), "invalid_custom_id", 1),
        (changed(custom_id=""), "invalid_custom_id", 1),
        (changed(method="GET"), "invalid_method", 1),
        (changed(url="/v1/embeddings"), "mismatched_url", 1),
        (changed(body=[]), "invalid_body", 1),
        (changed(more=1), "unknown_field", 1),
        (changed(body={"text": "x" * 600}) + request_line(2), "line_too_long", 1),
        (b"".join(map(request_line, range(11))), "too_many_lines", 11),
    ],
)
def test_what_is_refused_names_its_line(tmp_path: Path, data: bytes, code: str, line: int | None) -> None:
    found = scanned(tmp_path / "in", data)
    assert [(error["code"], error["line"]) for error in found.errors] == [(code, line)]
    assert found.lines == []
    assert all(error["message"].endswith(".") for error in found.errors)


def test_a_long_line_is_passed_over_whole(tmp_path: Path) -> None:
    found = scanned(tmp_path / "in", b"x" * 5000 + b"\n" + request_line(2) + b"bad\n")
    assert [(error["code"], error["line"]) for error in found.errors] == [
        ("line_too_long", 1),
        ("invalid_json_line", 3),
    ]


def test_errors_are_listed_up_to_a_number(tmp_path: Path) -> None:
    assert len(scanned(tmp_path / "in", b"bad\n" * 500).errors) == MAX_ERRORS


@given(
    bodies=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), min_size=1, max_size=8),
    end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    mark=st.booleans(),
)
def test_bodies_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, str]], end: bytes, mark: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "again.jsonl"
    requests = [{"custom_id": str(n), "method": "POST", "url": URL, "body": body} for n, body in enumerate(bodies)]
    data = end.join(orjson.dumps(request) for request in requests)
    found = scanned(path, (b"\xef\xbb\xbf" if mark else b"") + data)
    assert found.errors == []
    assert [line.custom_id for line in found.lines] == [request["custom_id"] for request in requests]
    assert [read_body(path, line) for line in found.lines] == bodies


def test_the_model_is_named_if_it_is_one(tmp_path: Path) -> None:
    assert scanned(tmp_path / "in", request_line(1) + request_line(2)).model == "tiny"
    assert scanned(tmp_path / "in", request_line(1) + request_line(2, model="other")).model is None


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    found = scanned(tmp_path / "in", request_line(1))
    (tmp_path / "in").write_bytes(request_line(2))
    with pytest.raises(ValueError, match="not 'line-1' any more"):
        read_body(tmp_path / "in", found.lines[0])


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 2}}, (3, 2)),
        ({"usage": {"input_tokens": 3, "output_tokens": 2}}, (3, 2)),
        ({"usage": None}, (0, 0)),
        ("text", (0, 0)),
    ],
)
def test_usage_of_every_api(body: Any, tokens: tuple[int, int]) -> None:
    assert usage(body) == tokens
