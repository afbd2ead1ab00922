"""Uploads: however the body is cut on its way, the same file and fields arrive; a body cut short is refused."""

from __future__ import annotations

import asyncio
import io
import itertools

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.serve.batch.upload import Form, receive
from qwenkit.serve.errors import ApiError

KIND = b"multipart/form-data; boundary=frontier"


def body(content: bytes, file_first: bool) -> bytes:
    purpose = b'--frontier\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    head = b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
    file = head + content + b"\r\n"
    return (file + purpose if file_first else purpose + file) + b"--frontier--\r\n"


def received(data: bytes, cuts: list[int], limit: int = 1 << 20) -> tuple[Form, bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    messages = [
        {"type": "http.request", "body": data[start:end], "more_body": end < len(data)}
        for start, end in itertools.pairwise(places)
    ]
    target = io.BytesIO()

    async def run() -> Form:
        waiting = iter(messages)

        async def receive_message() -> dict[str, object]:
            return next(waiting)

        async def room(size: int) -> None:
            if size > limit:
                raise ApiError(413, "too large")

        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", KIND)]}
        return await receive(Request(scope, receive_message), target, room)

    return asyncio.run(run()), target.getvalue()


@given(
    content=st.binary(max_size=80) | st.sampled_from([b"\r\n--frontie\r\n", b"--frontier", b"\r\n\r\n", b"\r"]),
    cuts=st.lists(st.integers(0, 300), max_size=12),
    file_first=st.booleans(),
)
def test_cuts_change_nothing(content: bytes, cuts: list[int], file_first: bool) -> None:
    form, written = received(body(content, file_first), cuts)
    assert (form.fields, form.filename, form.size) == ({"purpose": "batch"}, "a.jsonl", len(content))
    assert written == content


@given(cut=st.integers(1, 150))
def test_a_body_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ApiError) as caught:
        received(body(b"content", True)[: -cut - 2], [])
    assert caught.value.status == 400


def test_room_is_asked_before_it_is_taken() -> None:
    with pytest.raises(ApiError) as caught:
        received(body(b"x" * 5000, True), [], limit=4000)
    assert caught.value.status == 413


def test_fields_are_short() -> None:
    with pytest.raises(ApiError, match="longer than"):
        received(body(b"x", True).replace(b"\r\nbatch\r\n", b"\r\n" + b"b" * 5000 + b"\r\n"), [])
