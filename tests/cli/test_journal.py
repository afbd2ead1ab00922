"""The journal of a batch: whatever byte a run is killed at, the next one ends with the same file."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenkit.cli.journal import Journal, finished_lines

HEADER = {"model": "tiny", "input": "00ff", "sampling": {"stop": ["é"]}}


def record(line: int) -> dict[str, Any]:
    return {"line": line, "text": f"answer {line}: \n\u2028 好 {'x' * (line % 7)}"}


def run(path: Path, output: Path, lines: list[int], order: random.Random) -> list[int]:
    """One whole run; returns the lines that it had to compute."""
    computed = []
    with Journal(path, HEADER) as journal:
        todo = [line for line in lines if line not in journal.done]
        order.shuffle(todo)
        for line in todo:
            journal.append(line, record(line))
            computed.append(line)
        journal.finish(output)
    return computed


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 60), unique=True, min_size=1, max_size=12),
    st.lists(st.floats(0, 1), max_size=3),
    st.randoms(use_true_random=False),
)
def test_a_run_cut_anywhere_ends_like_an_uninterrupted_one(
    lines: list[int], cuts: list[float], order: random.Random
) -> None:
    expected = b"".join(json.dumps(record(line), ensure_ascii=False).encode() + b"\n" for line in sorted(lines))
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "out.partial", Path(folder) / "out"
        for cut in cuts:
            with Journal(path, HEADER) as journal:
                todo = [line for line in lines if line not in journal.done]
                order.shuffle(todo)
                for line in todo:
                    journal.append(line, record(line))
            data = path.read_bytes()
            path.write_bytes(data[: round(cut * len(data))])
            whole = path.read_bytes().count(b"\n") - 1
            assert len(finished_lines(path, HEADER)) == max(whole, 0)
        kept = finished_lines(path, HEADER)
        computed = run(path, output, lines, order)
        assert sorted([*kept, *computed]) == sorted(lines)  # nothing lost, nothing twice
        assert output.read_bytes() == expected
        assert [item.name for item in Path(folder).iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"input": "11"}, "begun with other input:"),
        ({"model": "b", "sampling": {}}, "begun with other model and sampling:"),
    ],
)
def test_another_batch_is_refused_and_left_alone(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, HEADER) as journal:
        journal.append(3, record(3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said):
        Journal(path, HEADER | changed)
    with pytest.raises(ValueError, match=said):
        finished_lines(path, HEADER | changed)
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"my notes", b"my notes\n", b'{"model": 1}\n', b"\xff\xfe\n", b"[1]\n"])
def test_a_file_that_is_no_journal_is_not_touched(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "out.partial"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is no journal"):
        Journal(path, HEADER)
    assert path.read_bytes() == data


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, HEADER) as journal:
        journal.append(1, record(1))
    path.write_bytes(path.read_bytes() + b"\0\0\0\n")
    with pytest.raises(ValueError, match="is damaged at byte"):
        finished_lines(path, HEADER)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    with Journal(path, HEADER), pytest.raises(ValueError, match="another run is writing"):
        Journal(path, HEADER)
    with Journal(path, HEADER):
        pass


def test_finished_lines_creates_nothing(tmp_path: Path) -> None:
    assert finished_lines(tmp_path / "out.partial", HEADER) == set()
    assert not list(tmp_path.iterdir())
