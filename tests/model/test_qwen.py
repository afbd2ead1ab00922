"""The one model definition against transformers' six, and against the original Qwen-1 code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwenkit.model.config import ModelConfig
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from tests.conftest import OPS
from tests.tiny_models import FAMILIES, tiny_pair

# The original's fp32 numbers are themselves within 1.1e-5 of float64; native kernels add in another order than torch does.
GOLDEN_TOLERANCE = 1e-5 if OPS == "reference" else 2e-5
DOCUMENTS = [[5, 3, 99, 7], [1], list(range(40, 81)), [8, 8, 8, 100, 0, 2, 17]]


def assert_equal_logits(reference: Any, model: Qwen, documents: list[list[int]]) -> None:
    """One packed pass of ours against one pass a document of theirs."""
    with torch.no_grad():
        logits = model.logits(model(*pack(documents, model.config)))
        theirs = torch.cat([reference(torch.tensor([document])).logits[0] for document in documents])
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_logits_equal_transformers(model_type: str) -> None:
    assert_equal_logits(*tiny_pair(model_type), DOCUMENTS)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1e4,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 0.9,
        },
    ],
    ids=["linear", "yarn", "yarn-betas"],
)
def test_stretched_rope_equals_transformers(model_type: str, rope: dict[str, Any]) -> None:
    assert_equal_logits(*tiny_pair(model_type, rope_parameters=rope), DOCUMENTS)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_sliding_window_by_layer_equals_transformers(model_type: str) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 5}
    if model_type != "qwen3_moe":
        changes["max_window_layers"] = 2
    reference, model = tiny_pair(model_type, **changes)
    assert 5 in model.config.sliding_windows
    assert (None in model.config.sliding_windows) == (model_type != "qwen3_moe")
    assert_equal_logits(reference, model, DOCUMENTS)


def test_attention_bias_and_partial_heads_of_llama_equal_transformers() -> None:
    assert_equal_logits(*tiny_pair("llama", attention_bias=True, mlp_bias=True, num_key_value_heads=4), DOCUMENTS)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    _, model = tiny_pair(model_type)
    with torch.no_grad():
        together = model(*pack(DOCUMENTS, model.config))
        apart = torch.cat([model(*pack([document], model.config)) for document in DOCUMENTS])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def qwen1_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tiny Qwen-1 of the fixture under Hugging Face's names (section by section, as the loader does it for real files)."""
    renamed = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(2):
        old, new = f"transformer.h.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", weights[f"{old}attn.c_attn.{kind}"].chunk(3), strict=True):
                renamed[f"{new}self_attn.{name}_proj.{kind}"] = part
        renamed[f"{new}self_attn.o_proj.weight"] = weights[f"{old}attn.c_proj.weight"]
        renamed[f"{new}mlp.gate_proj.weight"] = weights[f"{old}mlp.w2.weight"]
        renamed[f"{new}mlp.up_proj.weight"] = weights[f"{old}mlp.w1.weight"]
        renamed[f"{new}mlp.down_proj.weight"] = weights[f"{old}mlp.c_proj.weight"]
        renamed[f"{new}input_layernorm.weight"] = weights[f"{old}ln_1.weight"]
        renamed[f"{new}post_attention_layernorm.weight"] = weights[f"{old}ln_2.weight"]
    return renamed


class Golden:
    """Numbers that the original Qwen-1 code gave on a tiny config, trained length 8."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / "qwen1_tiny_golden.safetensors")
        self.facts = json.loads((folder / "qwen1_tiny_golden.json").read_text())
        self.weights = qwen1_names({k[2:]: v for k, v in self.tensors.items() if k.startswith("w.")})

    def model(self, **changes: Any) -> Qwen:
        model = Qwen(ModelConfig.from_dict({"model_type": "qwen", **self.facts["config"], **changes}))
        model.load_state_dict(self.weights, strict=True)
        return model.eval()


@pytest.fixture(scope="module")
def golden(data_folder: Path) -> Golden:
    return Golden(data_folder)


@torch.no_grad()
def full_logits(model: Qwen, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(*pack([ids.tolist()], model.config)))


@pytest.mark.parametrize("length", [6, 8, 9, 16, 17, 24])
def test_qwen1_logits_at_every_length(golden: Golden, length: int) -> None:
    ids = golden.tensors["ids"].flatten()[:length]
    _, _, ctx = pack([ids.tolist()], golden.model().config)
    assert ctx.rope_alpha is not None
    assert ctx.rope_alpha.unique().tolist() == golden.facts[f"ntk_alpha.len{length}"]
    expected = golden.tensors[f"logits.len{length}"].squeeze(0)
    torch.testing.assert_close(full_logits(golden.model(), ids), expected, atol=GOLDEN_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("logits.len24.nontk.nologn", {"use_dynamic_ntk": False, "use_logn_attn": False}),
        ("logits.len24.ntk.nologn", {"use_logn_attn": False}),
    ],
)
def test_qwen1_without_ntk_or_logn(golden: Golden, key: str, changes: dict[str, bool]) -> None:
    ids = golden.tensors["ids"].flatten()[:24]
    expected = golden.tensors[key].squeeze(0)
    torch.testing.assert_close(full_logits(golden.model(**changes), ids), expected, atol=GOLDEN_TOLERANCE, rtol=0)


def test_qwen1_padded_rows(golden: Golden) -> None:
    """The original pads rows on the left and counts positions over the padding, which LogN can see: given the same positions,
    each row is a document of its own length here too.
    """
    ids, mask = golden.tensors["batch.ids"], golden.tensors["batch.mask"].bool()
    documents = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    padded_positions = torch.arange(ids.shape[1]).expand_as(ids)[mask]
    model = golden.model()
    flat, positions, ctx = pack(documents, model.config)
    assert ctx.rope_alpha is not None
    starts = [sum(ctx.lengths[:i]) for i in range(len(documents))]
    assert ctx.rope_alpha[starts].tolist() == golden.facts["ntk_alpha.batch"]
    assert not torch.equal(positions, padded_positions)
    with torch.no_grad():
        logits = model.logits(model(flat, padded_positions, ctx))
    torch.testing.assert_close(logits, golden.tensors["batch.logits"][mask], atol=GOLDEN_TOLERANCE, rtol=0)
