"""Files that others lay out or name differently: parts of a GGUF, other types of blocks, shards without an index, bare names."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.gguf_file import TensorEntry, _stored
from qwenkit.weights.load import load_model
from qwenkit.weights.repacked import _source_files
from tests.text.test_prefix import GGUF_TOKENS
from tests.tiny_models import tiny_reference, write_tokenizer
from tests.weights.test_gguf_model import ARCHITECTURES, llama_cpp_tensors, random_model, tiny_config, write


def split(folder: Path, count: int, **changes: Any) -> list[Path]:
    """A qwen2 in `count` parts, as gguf-split writes them: metadata in the first only."""
    model = random_model(tiny_config("qwen2"))
    held = llama_cpp_tensors(model, ARCHITECTURES["qwen2"])
    names, paths = list(held), []
    for n in range(count):
        chosen = {name: held[name] for name in names[n * len(names) // count : (n + 1) * len(names) // count]}
        metadata = {"split__no": n, "split__count": count, "split__tensors__count": len(names)}
        paths.append(folder / f"x-{n + 1:05}-of-{count:05}.gguf")
        write(paths[-1], model, tensors=chosen, **(metadata | changes))
    return paths


@pytest.mark.parametrize("named", [0, 2])
def test_a_model_in_parts_is_the_whole_model(tmp_path: Path, named: int) -> None:
    paths = split(tmp_path, 3)
    write(tmp_path / "whole.gguf", random_model(tiny_config("qwen2")))
    found, whole = (load_model(path).state_dict() for path in (paths[named], tmp_path / "whole.gguf"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    assert _source_files(paths[0]) == paths  # what a cache of packed weights goes by


def test_parts_that_are_missing_or_of_others_are_named(tmp_path: Path) -> None:
    paths = split(tmp_path, 3)
    first = paths[0].read_bytes()
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(ValueError, match=r"x-00001-of-00003\.gguf: split\.no and split\.count are \(1, 3\)"):
        open_checkpoint(paths[1])
    paths[0].write_bytes(first)
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"x-00003-of-00003\.gguf is missing"):
        open_checkpoint(paths[0])
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="found by their names"):
        open_checkpoint(renamed)
    with pytest.raises(ValueError, match=r"split\.tensors\.count is 5, but the parts hold"):
        open_checkpoint(split(tmp_path, 2, split__tensors__count=5)[0])


@pytest.mark.parametrize(
    "kind", ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"]
)
def test_blocks_are_dequantized_as_the_gguf_package_does(tmp_path: Path, kind: str) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 60, (3, 2 * size), dtype=np.uint8)  # scales of such bytes are finite
    (tmp_path / "blocks").write_bytes(raw.tobytes())
    stored = _stored(tmp_path / "blocks", TensorEntry("w", (3, 2 * block), kind, 0, raw.nbytes))
    assert np.array_equal(stored.load().numpy(), dequantize(raw, GGMLQuantizationType[kind]), equal_nan=True)


def tokens_gguf(path: Path, model_type: str, pre: str | None) -> Path:
    tokens = [*GGUF_TOKENS[:-1], "20", "24"]
    lists = {"model": "gpt2", "tokens": tokens, "merges": ["2 0", "2 4"], "token_type": [1] * 256 + [3] * 3 + [1] * 2}
    said = {f"tokenizer__ggml__{key}": value for key, value in lists.items()}
    said |= {} if pre is None else {"tokenizer__ggml__pre": pre}
    write(path, random_model(tiny_config(model_type, vocab_size=len(tokens))), **said)
    return path


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("pre", [None, "default"])
def test_an_old_file_is_cut_as_qwen_cuts_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str, pre: str | None
) -> None:
    checkpoint = open_checkpoint(tokens_gguf(tmp_path / "x.gguf", model_type, pre))
    with caplog.at_level(logging.WARNING):
        assert len(checkpoint.tokenizer().encode("In 2024")) == 7
        checkpoint.tokenizer()
    assert [record.getMessage() for record in caplog.records if "tokenizer.ggml.pre" in record.getMessage()] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen", "megrez", "kormo"])
def test_other_names_of_qwens_cutting(tmp_path: Path, caplog: pytest.LogCaptureFixture, pre: str) -> None:
    tokenizer = open_checkpoint(tokens_gguf(tmp_path / "x.gguf", "qwen2", pre)).tokenizer()
    assert len(tokenizer.encode("In 2024")) == 7
    assert not caplog.records


def test_a_llama_without_pre_is_cut_as_before(tmp_path: Path) -> None:
    tokenizer = open_checkpoint(tokens_gguf(tmp_path / "x.gguf", "llama", None)).tokenizer()
    assert len(tokenizer.encode("In 2024")) == 5


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    reference = tiny_reference("qwen2")
    reference.save_pretrained(folder, max_shard_size="20KB")
    write_tokenizer(folder)
    return dict(reference.state_dict())


def as_torch_files(folder: Path) -> None:
    for path in list(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / f"pytorch_{path.stem}.bin")
        path.unlink()


@pytest.mark.parametrize("torch_files", [False, True])
def test_shards_without_an_index_are_read_where_all_are_there(tmp_path: Path, torch_files: bool) -> None:
    want = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    if torch_files:
        as_torch_files(tmp_path)
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in want.items())
    sorted(tmp_path.glob("*-of-*"))[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=r"index\.json is missing, and of the shards beside it these numbers: 2$"
    ):
        load_model(tmp_path)


@pytest.mark.parametrize("before", ["", "module.model.", "_orig_mod.model.", "base_model.model.model.", "module."])
def test_names_of_the_bare_model_and_behind_wrappers(tmp_path: Path, before: str) -> None:
    reference = tiny_reference("qwen3")
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {before + name.removeprefix("model."): value for name, value in state.items()}, tmp_path / "model.safetensors"
    )
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in reference.state_dict().items())
