"""Weights of another type than bfloat16 keep their values, or a line says that they are rounded and which flags keep them."""

import logging
from pathlib import Path

import pytest
import torch

from qwenkit import LLM, ops
from tests.conftest import OPS
from tests.tiny_models import tiny_reference, write_tokenizer


def folder_of(path: Path, dtype: torch.dtype) -> Path:
    tiny_reference("qwen2", hidden_size=64, intermediate_size=64).to(dtype).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_rounding_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    folder = folder_of(tmp_path, dtype)
    monkeypatch.delenv("QWENKIT_OPS")
    try:
        ops.use()
        if ops.native() is None:
            pytest.skip("no native library here: floats are computed with as they are")
        with caplog.at_level(logging.WARNING):
            llm = LLM(folder)
            quiet = len(caplog.records)
            exact = LLM(folder, weights="float", dtype="float32")
            assert len(caplog.records) == quiet  # what was asked for is not a matter of surprise
    finally:
        ops.use(OPS)
    ids = list(range(5, 60))
    got, want = (torch.tensor(each.score([ids])[0].logprobs[1:]) for each in (llm, exact))
    said = any("rounded to bfloat16; --weights float" in record.getMessage() for record in caplog.records)
    assert said is (dtype != torch.bfloat16)
    assert said or float((got - want).abs().mean()) < 1e-2
