"""A model inside a GGUF file: its metadata said in Hugging Face's words. In: a path. Out: `GgufCheckpoint`.

Covers the architectures llama, qwen, qwen2, qwen3, qwen2moe and qwen3moe as llama.cpp's conversion writes them. What the
metadata leaves open (tied embeddings, biases, sizes of experts, vocabulary) is read off the table of tensors.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenkit.errors import FieldError, shorten
from qwenkit.model.config_schema import Whole
from qwenkit.text.chat import ChatFormat, JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import END_TOKENS, Tokenizer
from qwenkit.weights import names
from qwenkit.weights.gguf_file import GgufFile, read_split_gguf
from qwenkit.weights.stored import StoredTensor

logger = logging.getLogger(__name__)

_MODEL_TYPES = {
    "llama": "llama",
    "qwen": "qwen",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
QWEN1_WINDOW = 6144  # tokens of history, where no generation_config.json says otherwise
_SIZE = Whole()
_LARGEST_NUMBER = 1e18
# Keys that change the arithmetic in other architectures, or of a later version, with the values that change nothing.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_length": (),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "expert_gating_func": (0, 1),  # not said, softmax
    "leading_dense_block_count": (0,),
    "use_parallel_residual": (False,),
    "rope.dimension_sections": (),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
_PLAIN_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class GgufCheckpoint:
    """A .gguf file as a `qwenkit.weights.checkpoint.Checkpoint`."""

    path: Path
    file: GgufFile
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> GgufCheckpoint:
        """Read header, metadata and tensor table. ValueError for a file that is corrupt or of an unknown architecture.

        `config` is the config.json that Hugging Face would have for this model.
        """
        file = read_split_gguf(path)
        try:
            config = _Reading(file).config()
            _check_rope_factors(file, config["head_dim"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cls(path, file, config)

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        recommended = {ours: self.file.metadata.get(f"general.sampling.{key}") for key, ours in _SAMPLING.items()}
        return {key: value for key, value in recommended.items() if type(value) in (int, float)}

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ends of text, turn and message that the file names, and those of `END_TOKENS` in its vocabulary."""
        found = [self.file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ids = tuple(token for token in found if type(token) is int and 0 <= token < 2**31)
        vocabulary = self.file.metadata.get("tokenizer.ggml.tokens")
        if isinstance(vocabulary, list):
            ids += tuple(vocabulary.index(token) for token in END_TOKENS if token in vocabulary)
        return tuple(dict.fromkeys(ids))

    def tensors(self) -> Iterator[StoredTensor]:
        for stored in self.file.tensors():
            parts = names.from_gguf(
                stored.name,
                architecture=self.file.metadata["general.architecture"],
                head_dim=self.config["head_dim"],
                num_experts=self.config.get("num_experts", 0),
            )
            for part in parts:
                yield names.apply(part, stored)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The vocabulary inside the file. ValueError when it has none, or none of the byte-level BPE kind."""
        model = self.file.metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise ValueError(
                f"{self.path}: tokenizer.ggml.model is {model!r}, but only 'gpt2' (byte-level BPE) is known"
            )
        types = self._list("token_type", int) if "tokenizer.ggml.token_type" in self.file.metadata else None
        tokens, merges = self._list("tokens", str), self._list("merges", str)
        return Tokenizer.from_bpe(tokens, merges, types, self.pre, self._prefix())

    @cached_property
    def pre(self) -> str:
        """tokenizer.ggml.pre; Qwen's own cutting where an old file of a Qwen does not say or says "default", with a warning."""
        said = self._string("tokenizer.ggml.pre", "default")
        if said != "default" or self.config["model_type"] == "llama":
            return said
        logger.warning(
            "%s: tokenizer.ggml.pre is %s, so text is cut as %s does it (qwen2)",
            self.path,
            "'default'" if "tokenizer.ggml.pre" in self.file.metadata else "missing",
            self.config["model_type"],
        )
        return "qwen2"

    def _prefix(self) -> tuple[int, ...]:
        """bos_token_id where add_bos_token is true; llama.cpp takes it as true for Llama 3's vocabulary where it is missing.

        ValueError where a true value has no token.
        """
        wanted, bos = (self.file.metadata.get(f"tokenizer.ggml.{key}") for key in ("add_bos_token", "bos_token_id"))
        if wanted is None:
            wanted = self.pre in _LLAMA3 and bos is not None
        if wanted is False:
            return ()
        if wanted is not True:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.add_bos_token must be true or false, found {shorten(wanted)}"
            )
        if type(bos) is not int or not 0 <= bos < len(self._list("tokens", str)):
            raise ValueError(
                f"{self.path}: tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is {shorten(bos)}, "
                "no id of the vocabulary"
            )
        return (bos,)

    def chat(self) -> ChatFormat | None:
        template = self._string("tokenizer.chat_template", "")
        if template:
            return JinjaChat(self.tokenizer(), template, variables=self.named_tokens())
        return Qwen1Chat(self.tokenizer(), max_window_size=QWEN1_WINDOW) if self._is_qwen1_chat() else None

    def named_tokens(self) -> dict[str, str]:
        """What a template may call bos_token, eos_token, …"""
        tokens = self._list("tokens", str)
        found: dict[str, str] = {}
        for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
            token = self.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            if type(token) is int and 0 <= token < len(tokens):
                found[f"{name}_token"] = tokens[token]
        return found

    def _is_qwen1_chat(self) -> bool:
        return self.config["model_type"] == "qwen" and "tokenizer.chat_template" not in self.file.metadata

    def _string(self, key: str, default: str) -> str:
        value = self.file.metadata.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: {key} must be a string, found {type(value).__name__}")
        return value

    def _list(self, name: str, kind: type) -> list[Any]:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise ValueError(f"{self.path}: tokenizer.ggml.{name} must be a list of {kind.__name__}")
        return value


def _check_rope_factors(file: GgufFile, head_dim: int) -> None:
    """Llama 3.1's frequency factors would change the arithmetic; a list of ones (older writers) does not."""
    for stored in file.tensors():
        if stored.name == "rope_freqs.weight" and (
            math.prod(stored.shape) > head_dim or bool((stored.load() != 1).any())
        ):
            raise ValueError("rope_freqs.weight asks for Llama 3's rotary scaling, which is not supported")


class _Reading:
    """One pass over metadata and tensor table, from llama.cpp's keys to those of config.json."""

    def __init__(self, file: GgufFile) -> None:
        self.metadata = file.metadata
        self.shapes = {entry.name: entry.shape for entry in file.all_entries}
        self.entries = file.all_entries
        self.architecture = file.metadata.get("general.architecture")
        if not isinstance(self.architecture, str) or self.architecture not in _MODEL_TYPES:
            known = ", ".join(_MODEL_TYPES)
            raise ValueError(f"general.architecture {self.architecture!r} is not supported; known are {known}")

    def size(self, key: str, default: int | None = None) -> int:
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        if value is None:
            raise ValueError(f"{full} is missing")
        if not _SIZE.accepts(value):
            raise FieldError(full, value, _SIZE.words)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        if value is None:
            raise ValueError(f"{full} is missing")
        if type(value) not in (int, float) or not 0 < value < _LARGEST_NUMBER:
            raise FieldError(full, value, f"a number above 0 and below {_LARGEST_NUMBER:g}")
        return float(value)

    def refuse_foreign_keys(self) -> None:
        """FieldError for a key, which no reader of this architecture has, that asks for other arithmetic."""
        for key, neutral in _FOREIGN.items():
            value = self.metadata.get(f"{self.architecture}.{key}")
            if value is not None and value not in neutral:
                allowed = f"only {' or '.join(map(repr, neutral))}" if neutral else "nothing"
                raise FieldError(f"{self.architecture}.{key}", value, allowed)

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def shape(self, name: str, num_dimensions: int) -> tuple[int, ...]:
        found = self.shapes.get(name)
        if found is None or len(found) != num_dimensions:
            has = f"of shape {list(found)}" if found else "missing"
            raise ValueError(f"tensor {name} is {has}, but {num_dimensions} dimensions are needed")
        return found

    def config(self) -> dict[str, Any]:
        self.refuse_foreign_keys()
        # A count of layers that the table bears out is safe to build.
        layers = {int(m[1]) for name in self.shapes if (m := re.match(r"blk\.(\d{1,9})\.", name))}
        num_layers = self.size("block_count")
        if num_layers != len(layers) or num_layers != max(layers) + 1:
            raise ValueError(
                f"{self.architecture}.block_count is {num_layers}, but tensors of {len(layers)} layers found"
            )
        heads = self.size("attention.head_count")
        hidden_size = self.size("embedding_length")
        head_dim = self.size("attention.key_length", max(hidden_size // heads, 1))
        if self.has("attention.value_length") and self.size("attention.value_length") != head_dim:
            raise ValueError(f"{self.architecture}.attention.value_length differs from the key length {head_dim}")
        common = {
            "model_type": _MODEL_TYPES[str(self.architecture)],
            "vocab_size": self.shape("token_embd.weight", 2)[0],
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.size("context_length"),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "dtype": self.dtype(),
        }
        for name in ("bos", "eos"):
            token = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if type(token) is int and 0 <= token < 2**31:
                common[f"{name}_token_id"] = token
        return common | (self.qwen1(head_dim) if self.architecture == "qwen" else self.modern(heads, head_dim))

    def dtype(self) -> str:
        """Of most weights. Only fp32 holds dequantized blocks exactly, so that is what a quantized file has."""
        elements: Counter[str] = Counter()
        for entry in self.entries:
            if len(entry.shape) > 1:
                elements[entry.type] += math.prod(entry.shape)
        return _PLAIN_DTYPES.get(elements.most_common(1)[0][0], "float32") if elements else "float32"

    def qwen1(self, head_dim: int) -> dict[str, Any]:
        """Qwen-1's own keys. Its feed_forward_length counts gate and up together, as its config.json does.

        The trained length and the switches of NTK and LogN are not in the file: off, as in llama.cpp.
        """
        return {
            "intermediate_size": self.size("feed_forward_length"),
            "kv_channels": head_dim,
            "seq_length": self.size("context_length"),
            "rotary_emb_base": self.number("rope.freq_base", 10000.0),
            "rotary_pct": self.size("rope.dimension_count", head_dim) / head_dim,
            "layer_norm_epsilon": self.number("attention.layer_norm_rms_epsilon"),
            "use_dynamic_ntk": False,
            "use_logn_attn": False,
            "no_bias": "blk.0.attn_output.bias" not in self.shapes,
        }

    def modern(self, heads: int, head_dim: int) -> dict[str, Any]:
        if self.size("rope.dimension_count", head_dim) != head_dim:
            raise FieldError(
                f"{self.architecture}.rope.dimension_count",
                self.size("rope.dimension_count"),
                f"only {head_dim}, the width of a head",
            )
        config: dict[str, Any] = {
            "hidden_act": "silu",
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self.number("rope.freq_base", 10000.0),
            "rope_scaling": self.rope_scaling(),
            "attention_bias": "blk.0.attn_q.bias" in self.shapes,
            "mlp_bias": "blk.0.ffn_gate.bias" in self.shapes,
        }
        if str(self.architecture).endswith("moe"):
            return config | self.experts()
        return config | {"intermediate_size": self.size("feed_forward_length")}

    def rope_scaling(self) -> dict[str, Any] | None:
        """YaRN's or a linear scaling. As in llama.cpp, one without a type is linear, and older files say it as scale_linear."""
        older = "" if self.has("rope.scaling.factor") or not self.has("rope.scale_linear") else "rope.scale_linear"
        scaled = bool(older) or self.has("rope.scaling.factor")
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "linear" if scaled else "none")
        if kind not in ("none", "linear", "yarn"):
            raise FieldError(f"{self.architecture}.rope.scaling.type", kind, "none, linear or yarn")
        if kind == "none":
            return None
        factor = self.number(older or "rope.scaling.factor")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "linear":
            return scaling
        scaling["original_max_position_embeddings"] = self.size(
            "rope.scaling.original_context_length", self.size("context_length")
        )
        for key, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if self.has(f"rope.scaling.{key}"):
                scaling[ours] = self.number(f"rope.scaling.{key}")
        temperature = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        if self.has("rope.scaling.attn_factor"):
            # llama.cpp multiplies YaRN's own temperature by it; in Hugging Face's config it replaces that.
            scaling["attention_factor"] = self.number("rope.scaling.attn_factor") * temperature
        elif self.has("rope.scaling.yarn_attn_factor"):
            scaling["attention_factor"] = self.yarn_attn_factor(temperature)
        return scaling

    def yarn_attn_factor(self, temperature: float) -> float:
        """What llama.cpp's converter took from a folder: its attention_factor, else its attn_factor; the file does not say which.

        The one replaces YaRN's temperature, the other multiplies it. Published models have the latter to undo the temperature.
        """
        value = self.number("rope.scaling.yarn_attn_factor")
        if math.isclose(value * temperature, 1.0, rel_tol=1e-3):
            return 1.0
        logger.warning("%s.rope.scaling.yarn_attn_factor is taken as attention_factor, %g", self.architecture, value)
        return value

    def experts(self) -> dict[str, Any]:
        """Every layer has experts in these architectures; sizes that older writers left out are read off the first."""
        num_experts = self.size("expert_count")
        stacked = self.shape("blk.0.ffn_gate_exps.weight", 3)
        if stacked[0] != num_experts:
            raise ValueError(
                f"{self.architecture}.expert_count is {num_experts}, but tensor blk.0.ffn_gate_exps.weight "
                f"holds {stacked[0]} experts"
            )
        width = self.size("expert_feed_forward_length", stacked[1])
        config: dict[str, Any] = {
            "intermediate_size": self.size("feed_forward_length", width),
            "num_experts": num_experts,
            "num_experts_per_tok": self.size("expert_used_count"),
            "moe_intermediate_size": width,
            "norm_topk_prob": self.architecture == "qwen3moe",  # fixed by architecture in llama.cpp
        }
        if self.architecture == "qwen2moe":
            shared = self.shape("blk.0.ffn_gate_shexp.weight", 2)[0]
            config["shared_expert_intermediate_size"] = self.size("expert_shared_feed_forward_length", shared)
        return config
