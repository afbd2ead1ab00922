"""The reader of files from strangers: what json reads it reads, everything else is one sentence."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenkit import files
from qwenkit.errors import FieldError, shorten

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_what_json_writes_is_read(value: Any) -> None:
    assert files.parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) == json.loads(
        json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    )


def assert_one_sentence(error: ValueError) -> None:
    assert str(error).startswith(("is not valid JSON: ", "holds too many values: "))
    assert "\n" not in str(error)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:01eE-.nulNaINfity ', max_size=40).map(str.encode))
def test_any_bytes_are_a_value_or_one_sentence(data: bytes) -> None:
    try:
        files.parse_json(data)
    except ValueError as error:
        assert_one_sentence(error)


@pytest.mark.parametrize("depth", [files.MAX_DEPTH + 1, 500, 100_000])
def test_depth(depth: int) -> None:
    with pytest.raises(ValueError, match="is not valid JSON: it is nested more than 64 deep"):
        files.parse_json(b"[" * depth + b"]" * depth)
    files.parse_json(b"[" * files.MAX_DEPTH + b"]" * files.MAX_DEPTH)


def test_the_number_of_values_is_looked_at_before_they_are_built() -> None:
    assert files.parse_json(b"[1, 2, 3]", max_items=3) == [1, 2, 3]
    with pytest.raises(ValueError, match="holds too many values: 4 commas and brackets, allowed are 3"):
        files.parse_json(b"[1, 2, 3, nonsense", max_items=3)


def test_numbers_that_are_not_finite_name_their_key() -> None:
    with pytest.raises(ValueError, match="'b' is inf, which is no finite number"):
        files.parse_json(b'{"a": 1, "b": 1e999}')
    with pytest.raises(ValueError, match="an item of a list is nan"):
        files.parse_json(b'{"a": [1, NaN]}')
    assert math.isnan(files.parse_json(b'{"a": NaN}', allow_nan=True)["a"])


def test_a_key_that_occurs_twice_is_named() -> None:
    with pytest.raises(ValueError, match="the key 'b' occurs twice, as 1 and 2"):
        files.parse_json(b'{"a": 0, "b": 1, "b": 2}')


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(path) == {"a": 1}
    for content, found in ((b"[]", "a list"), (b"3", "a number"), (b"null", "null"), (b"true", "true or false")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"config\.json must hold a JSON object, found {found}$"):
            files.read_json(path)
    path.write_bytes(b'{"a": "' + b"x" * 100 + b'"}')
    with pytest.raises(ValueError, match=r"config\.json has 109 bytes, allowed are at most 50"):
        files.read_json(path, 50)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")


def test_has_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert not files.has_file(path)
    assert not files.has_file(path / "below")
    path.symlink_to(tmp_path / "nowhere")
    assert not files.has_file(path)
    (tmp_path / "nowhere").write_text("")
    assert files.has_file(path)
    assert not files.has_file(path / "below")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for wrong, words in ((tmp_path, "is a directory"), (loop, "cannot be read"), (Path("a\0b"), "cannot be read")):
        with pytest.raises(ValueError, match=words):
            files.has_file(wrong)


def test_open_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"fifo is a named pipe \(FIFO\), but a regular file is needed"):
        files.open_file(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"/dev/zero is a character device"):
        files.read_file(Path("/dev/zero"), 10)
    (tmp_path / "file").write_bytes(b"abc")
    with files.open_file(tmp_path / "file") as file:
        assert file.read() == b"abc"


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jinja"
    path.write_bytes("\ufeffzwölf".encode())
    assert files.read_text(path) == "zwölf"
    path.write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"x\.jinja is not valid UTF-8: byte 1"):
        files.read_text(path)


def test_values_in_sentences_are_short() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    many = {str(index): index for index in range(1000)}
    for value in (10**5000, "x\ny" * 1000, [[[[[[1]]]]]] * 1000, many, b"\0" * 999, deep):
        text = shorten(value)
        assert len(text) < 300
        assert "\n" not in text
        said = str(FieldError("field", value, "a number", source="config"))
        assert said == f"config: field is {text}, allowed is a number"
    while deep:  # taken apart from outside: freeing it at once would recurse
        deep = deep[0]
