"""Packing: nothing lost, nothing twice, nothing cut that need not be, and the buffer goes on exactly where it was."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwenkit.train.data.packing import Chunker, Packer, plan_chunks, plan_packs, plan_singles

LENGTHS = st.lists(st.integers(1, 30), max_size=120)


def packs_of(packer: Packer[int], lengths: list[int], start: int = 0) -> list[list[int]]:
    packs = [packer.add(index, lengths[index]) for index in range(start, len(lengths))]
    while (last := packer.pop()) is not None:
        packs.append(last)
    return [pack for pack in packs if pack is not None]


@given(LENGTHS, st.integers(1, 40), st.integers(0, 8))
def test_every_sample_is_in_exactly_one_pack(lengths: list[int], capacity: int, max_open: int) -> None:
    packs = packs_of(Packer(capacity, max_open), lengths)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[index] for index in pack) <= capacity


@given(LENGTHS, st.integers(1, 40), st.integers(0, 8), st.data())
def test_a_packer_goes_on_from_any_point(lengths: list[int], capacity: int, max_open: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(lengths)))
    first: Packer[int] = Packer(capacity, max_open)
    early = [pack for index in range(cut) if (pack := first.add(index, lengths[index])) is not None]
    second: Packer[int] = Packer(capacity, max_open)
    second.open_packs = first.open_packs
    assert early + packs_of(second, lengths, cut) == packs_of(Packer(capacity, max_open), lengths)


def test_packs_are_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 500, 5000)
    plan = plan_packs(range(5000), lengths, 2048)
    assert lengths.sum() / (len(plan) * 2048) > 0.98


@given(LENGTHS, st.integers(1, 40))
def test_chunks_are_the_documents_end_to_end(lengths: list[int], capacity: int) -> None:
    plan = plan_chunks(range(len(lengths)), np.array(lengths), capacity)
    parts = [part for index in range(len(plan)) for part in plan[index]]
    tokens = [(document, place) for document, start, stop in parts for place in range(start, stop)]
    assert tokens == [(document, place) for document, length in enumerate(lengths) for place in range(length)]
    assert all(size == capacity for size in plan.sizes()[:-1])


@given(LENGTHS, st.integers(1, 40), st.data())
def test_a_chunker_goes_on_from_any_point(lengths: list[int], capacity: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(lengths)))

    def chunks(chunker: Chunker[int], start: int, stop: int) -> list[list[tuple[int, int, int]]]:
        given = []
        for index in range(start, stop):
            chunker.add(index, lengths[index])
            while (chunk := chunker.pop()) is not None:
                given.append(chunk)
        return given

    whole: Chunker[int] = Chunker(capacity)
    expected = [*chunks(whole, 0, len(lengths)), whole.pop(rest=True)]
    first: Chunker[int] = Chunker(capacity)
    early = chunks(first, 0, cut)
    second: Chunker[int] = Chunker(capacity)
    second.load(first.slices)
    assert [*early, *chunks(second, cut, len(lengths)), second.pop(rest=True)] == expected
    assert second.pop(rest=True) is None


def test_singles() -> None:
    plan = plan_singles([2, 0], np.array([5, 6, 7]))
    assert [plan[index] for index in range(len(plan))] == [[(2, 0, 7)], [(0, 0, 5)]]
    assert plan.sizes().tolist() == [7, 5]
