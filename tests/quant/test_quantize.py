"""A whole model becomes a folder that loads here and elsewhere; runs that are stopped go on; bad input leaves nothing behind."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwenkit import LLM
from qwenkit.model.config import ModelConfig
from qwenkit.model.context import pack
from qwenkit.quant import files, quantize
from qwenkit.quant.config import QuantConfig
from qwenkit.quant.gptq import Quantized, round_to_nearest
from qwenkit.quant.layout import gptq_tensors
from qwenkit.quant.quantize import LayerError, quantize_model
from qwenkit.weights import names
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import empty_model, load_model
from tests.tiny_models import write_model, write_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}


def documents(count: int = 12, length: int = 40, vocab: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for _ in range(count)]


def made(source: Path, output: Path, *, texts: list[list[int]] | None = None, **changes: Any) -> list[LayerError]:
    config = QuantConfig(**({"device": "cpu"} | changes))
    return quantize_model(open_checkpoint(source), output, config, documents() if texts is None else texts)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def output_error(source: Path, folder: Path) -> float:
    """Squared error of the logits on text that was not the calibration's."""
    models = [load_model(path, dtype=torch.float32) for path in (source, folder)]
    with torch.no_grad():
        logits = [each.logits(each(*pack([list(range(100, 180))], each.config))) for each in models]
    return float(((logits[0] - logits[1]) ** 2).sum() / (logits[0] ** 2).sum())


def as_public_readers_do(folder: Path, bits: int, group_size: int) -> dict[str, np.ndarray]:
    """Every quantized matrix by the published layout, word by word: w = scale * (code - (stored zero + 1))."""
    tensors = load_file(folder / "model.safetensors")
    mask, per_word = 2**bits - 1, 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * bits
    found = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        words = tensors[name].numpy().view(np.uint32)
        codes = ((words[:, None] >> shifts[None, :, None]) & mask).reshape(-1, words.shape[1]).astype(np.int64)
        zero_words = tensors[f"{module}.qzeros"].numpy().view(np.uint32)
        zeros = ((zero_words[:, :, None] >> shifts) & mask).reshape(len(zero_words), -1).astype(np.int64)
        zeros = (zeros + 1) & mask
        group_of = tensors[f"{module}.g_idx"].numpy()
        scales = tensors[f"{module}.scales"].numpy().astype(np.float64)
        if group_size > 0:
            assert len(scales) == -(-len(codes) // group_size)
        found[module] = (scales[group_of] * (codes - zeros[group_of])).T
    return found


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_a_folder_that_loads(model_type: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", model_type, **SIZES)
    errors = made(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32
    assert len(errors) == 3 * 7
    assert all(each.method == "gptq" and each.tokens == 480 and 0 < each.error < 0.1 for each in errors)  # type: ignore[operator]
    model = load_model(tmp_path / "out")
    for name, values in as_public_readers_do(tmp_path / "out", 4, 32).items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert np.array_equal(weight.detach().numpy(), values.astype(np.float32))
    answer = LLM(tmp_path / "out", kv_memory="1MiB").generate([1, 2, 3])
    assert answer[0].completions[0].token_ids
    assert LLM(tmp_path / "out", kv_memory="1MiB").encode([{"role": "user", "content": "hello"}])
    made(source, tmp_path / "nearest", method="rtn", texts=[])
    assert output_error(source, tmp_path / "out") < output_error(source, tmp_path / "nearest")


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"sym": False},
        {"sym": False, "format": "gptq_v2"},
        {"group_size": -1},
        {"group_size": 64, "short_groups": True},
        {"desc_act": True},
        {"gptaq": True},
    ],
)
def test_what_is_read_is_what_was_computed(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and by the layers' errors better than nothing."""
    computed: list[torch.Tensor] = []

    def remember(function: Callable[..., Quantized]) -> Callable[..., Quantized]:
        def wrapped(*args: Any) -> Quantized:
            result = function(*args)
            computed.append(result.values)
            return result

        return wrapped

    monkeypatch.setattr(quantize, "gptq", remember(quantize.gptq))
    source = write_model(tmp_path / "source", num_hidden_layers=1, **SIZES)
    errors = made(source, tmp_path / "out", **changes)
    model = load_model(tmp_path / "out")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    stages = [
        [attention.q_proj, attention.k_proj, attention.v_proj],  # type: ignore[union-attr]
        [attention.o_proj],  # type: ignore[union-attr]
        [mlp.gate_proj, mlp.up_proj],  # type: ignore[union-attr]
        [mlp.down_proj],  # type: ignore[union-attr]
    ]
    for values, linears in zip(computed, stages, strict=True):
        assert torch.equal(torch.cat([linear.weight for linear in linears]), values)  # type: ignore[misc]
    assert max(each.error or 1 for each in errors) < (1e-3 if changes.get("bits") == 8 else 0.2)


def test_zero_points_do_not_borrow_from_their_neighbours() -> None:
    """A 0 is stored as all ones, and only in its own field."""
    matrix = round_to_nearest(torch.randn(8, 32), QuantConfig(group_size=32, sym=False))
    matrix.zeros[:, 0] = torch.tensor([0, 5, 9, 3, 0, 8, 15, 1], dtype=torch.uint8)
    assert gptq_tensors([matrix], 4)["qzeros"].numpy().view(np.uint32).tolist() == [[0x0E7F284F]]
    assert gptq_tensors([matrix], 4, v2=True)["qzeros"].numpy().view(np.uint32).tolist() == [[0x1F803950]]
    symmetric = round_to_nearest(torch.randn(8, 32), QuantConfig(group_size=32))
    assert gptq_tensors([symmetric], 4)["qzeros"].tolist() == [[0x77777777]]


def test_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each with a Hessian of its own; one that no token reaches is rounded to nearest, and that is said."""
    source = write_model(tmp_path / "source", "qwen2_moe", **SIZES, **EXPERTS)
    with caplog.at_level("WARNING"):
        errors = made(source, tmp_path / "out", texts=documents(1, 4))
    experts = [each for each in errors if ".experts." in each.name]
    assert len(experts) == 2 * 6 * 3
    unseen = [each for each in experts if each.method == "rtn"]
    assert unseen
    assert all(each.tokens == 0 and each.error is None for each in unseen)
    assert f"{len(unseen)} matrices of experts saw fewer than 0.5% of the calibration's tokens" in caplog.text
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["dynamic"]) == {r"-:.*\.mlp\.gate$", r"-:.*\.shared_expert_gate$"}
    made(source, tmp_path / "well", gptaq=True)
    report = json.loads((tmp_path / "well" / "quantize_report.json").read_text())["layers"]
    assert all(each["method"] == "gptq" and each["error"] < 0.1 for each in report)
    assert load_model(tmp_path / "well")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("gptaq", [False, True])
@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_run_that_was_stopped_goes_on(
    after: int, gptaq: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the same bytes as one that was not."""
    source = write_model(tmp_path / "source", **SIZES)
    made(source, tmp_path / "straight", gptaq=gptaq)
    whole = quantize._Run._quantize
    quantized: list[int] = []

    def stop(self: Any, block: Any, number: int, streams: Any) -> Any:
        if number == after:
            raise StoppedError
        quantized.append(number)
        return whole(self, block, number, streams)

    def stop_at_the_end(*args: Any) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(quantize._Run, "_quantize", stop)
        patch.setattr(quantize, "assemble", stop_at_the_end)
        with pytest.raises(StoppedError):
            made(source, tmp_path / "out", gptaq=gptaq)
    assert quantized == list(range(after))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"out\.part is left of a run with another config: run that again"):
        made(source, tmp_path / "out", gptaq=gptaq, seed=1)
    with pytest.raises(ValueError, match="with another calibration"):
        made(source, tmp_path / "out", gptaq=gptaq, texts=documents(3))
    made(source, tmp_path / "out", gptaq=gptaq)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "straight"]


def test_the_first_qwen_keeps_its_names(tmp_path: Path, data_folder: Path) -> None:
    """q, k and v in one c_attn, as its own tools have it."""
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((data_folder / "qwen1_tiny_golden.json").read_text())["config"]
    config |= {"model_type": "qwen", "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    torch.manual_seed(0)
    joined: dict[str, list[torch.Tensor]] = {}
    for name, parameter in empty_model(ModelConfig.from_dict(config), torch.float32).named_parameters():
        joined.setdefault(names.to_qwen1(name).name, []).append(torch.randn(parameter.shape) * 0.2)
    write_tokenizer(source)
    files.write_tensors(source / "model.safetensors", {name: torch.cat(parts) for name, parts in joined.items()})
    (source / "config.json").write_text(json.dumps(config))
    made(source, tmp_path / "out", texts=documents(vocab=64))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "transformer.h.0.attn.c_attn.qweight" in written
    assert "transformer.h.0.attn.c_attn.bias" in written
    assert not any(name.startswith("model.") for name in written)
    model = load_model(tmp_path / "out")
    values = as_public_readers_do(tmp_path / "out", 4, 0)["transformer.h.0.attn.c_attn"]
    third = len(values) // 3
    for place, kind in enumerate("qkv"):
        weight = model.get_submodule(f"model.layers.0.self_attn.{kind}_proj").weight
        assert isinstance(weight, torch.Tensor)
        assert np.array_equal(weight.detach().numpy(), values[place * third :][:third].astype(np.float32))


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "source", **SIZES)
    made(source, tmp_path / "one")
    monkeypatch.setattr(files.assemble, "__defaults__", (40_000,))
    made(source, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "many" / "model.safetensors").exists()
    one, many = (load_model(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", **SIZES)
    before = sorted(path.name for path in tmp_path.iterdir())

    def refused(sentence: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=sentence):
            made(source, tmp_path / "out", **changes)
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    refused("group_size is 128, but model.layers.0.self_attn.q_proj has 64 inputs", group_size=128)
    refused("there is no calibration text", texts=[])
    made(source, tmp_path / "done")
    with pytest.raises(ValueError, match="done is not empty: name a new folder"):
        made(source, tmp_path / "done")
    with pytest.raises(ValueError, match="is quantized already: quantize the model that it was made from"):
        made(tmp_path / "done", tmp_path / "again")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, a new folder is needed"):
        made(source, tmp_path / "file")
    assert not (tmp_path / "again").exists()


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the start, nothing is made; met on the way, what is finished is kept and no file is cut."""
    source = write_model(tmp_path / "source", **SIZES)
    usage = type("Usage", (), {"free": 10})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(ValueError, match=r"has 0\.0 GB free, but about 0\.0 GB are needed"):
            made(source, tmp_path / "out")
    assert not (tmp_path / "out.part").exists()
    written: list[Path] = []
    whole = files.write_bytes

    def full(path: Path, write: Callable[[Any], None]) -> None:
        written.append(path)
        if len(written) < 2:
            return whole(path, write)

        def half(file: Any) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        return whole(path, half)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with pytest.raises(OSError, match="the disk is full; the blocks that are finished are kept in"):
            made(source, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out.part").iterdir())
    assert kept == ["block-00000.json", "block-00000.tensors", "run.json"]
    made(source, tmp_path / "out")
    assert load_model(tmp_path / "out")
