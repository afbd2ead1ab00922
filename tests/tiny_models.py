"""Tiny random models of every supported type, in memory beside transformers' own and as folders on disk."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + 5  # like real checkpoints, the embedding has more rows than there are tokens
EOS, IM_START, IM_END = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS | {"head_dim": 16, "norm_topk_prob": True},
}


def tiny_reference(model_type: str, **changes: Any) -> Any:
    """transformers' random fp32 network of a type."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | changes))
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if (
                name.endswith("bias") or "norm" in name
            ):  # random init leaves these at 0 and 1, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference


def tiny_pair(model_type: str, **changes: Any) -> tuple[Any, Qwen]:
    """The same network twice: transformers' and ours, loaded with no renames but those of the stacked experts."""
    reference = tiny_reference(model_type, **changes)
    model = Qwen(ModelConfig.from_dict(reference.config.to_dict()))
    model.load_state_dict(_separate_experts(reference.state_dict()), strict=True)
    return reference, model.eval()


def _separate_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps experts stacked in memory; files and this project keep them apart."""
    separate = {}
    for name, tensor in state.items():
        prefix, stacked, kind = name.partition(".experts.")
        if not stacked:
            separate[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = weight.chunk(2)
                separate[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                separate[f"{prefix}.experts.{expert}.up_proj.weight"] = up
            else:
                separate[f"{prefix}.experts.{expert}.{kind}.weight"] = weight
    return separate


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: ids 0-255 are bytes (in the byte-level alphabet's order), then ChatML's specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, model_type: str = "qwen2", **changes: Any) -> Path:
    """A whole model folder: config, weights, tokenizer, template."""
    reference = tiny_reference(model_type, **changes)
    reference.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, IM_END], "do_sample": False}))
    write_tokenizer(folder)
    return folder
