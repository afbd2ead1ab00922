"""Memory of results: given out again when nobody holds it, never before."""

import torch

from qwenkit.ops.cpu.buffers import SPARE, Buffers


def test_memory_is_used_again_when_the_result_and_its_views_are_gone() -> None:
    buffers = Buffers(keep=False)
    result = buffers.empty(4, 6)
    address = result.data_ptr()
    view = result.unflatten(1, (2, 3))
    del result
    other = buffers.empty(4, 6)
    assert other.data_ptr() != address
    view.fill_(1)
    other.fill_(2)
    assert view.sum() == 24
    del view
    again = buffers.empty(3, 5)
    assert again.data_ptr() == address
    assert again.is_contiguous()
    assert again.shape == (3, 5)


def test_a_result_never_lies_in_memory_far_too_large_or_of_another_dtype() -> None:
    buffers = Buffers(keep=False)
    large = buffers.empty(SPARE * 10 + 1).data_ptr()
    assert buffers.empty(10).data_ptr() != large
    assert buffers.empty(SPARE * 10, dtype=torch.int8).data_ptr() != large
    assert buffers.empty(11).data_ptr() == large


def test_growing_prompts_leave_no_memory_behind() -> None:
    buffers = Buffers(keep=False)
    for size in range(1, 200):
        buffers.empty(size)
    assert sum(buffer.flat.size for buffer in buffers._buffers) <= 2 * 200


def test_recorded_programs_keep_their_memory() -> None:
    buffers = Buffers(keep=True)
    first = buffers.empty(10).data_ptr()
    buffers.empty(20)
    assert buffers.owns(buffers.empty(15))
    assert not buffers.owns(torch.empty(10))
    assert any(buffer.address == first for buffer in buffers._buffers)
