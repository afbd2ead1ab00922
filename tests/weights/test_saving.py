"""The tokenizer inside a GGUF becomes files that this project and transformers read alike; those of a folder are copied."""

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import pre_tokenizers

from qwenkit.quant.config import QuantConfig
from qwenkit.quant.quantize import quantize_model
from qwenkit.weights.checkpoint import open_checkpoint
from tests.tiny_models import CHAT_TEMPLATE, write_model
from tests.weights.test_gguf_model import random_model, tiny_config, write

TEXT = "hello there, 1234 hell\n\n  ünï 你好 <think>x</think> <|im_end|>"


@pytest.mark.parametrize("pre", ["qwen2", "smollm", "default", "llama-bpe"])
@pytest.mark.parametrize("kinds", [True, False])
def test_a_gguf_becomes_a_folder(pre: str, kinds: bool, tmp_path: Path) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "hello", "Ġt", "12"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ t", "1 2"]
    added = ["<think>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    metadata: dict[str, object] = {"model": "gpt2", "pre": pre, "tokens": [*tokens, *added], "merges": merges}
    metadata |= {"eos_token_id": len(tokens) + 3, "bos_token_id": len(tokens) + 1}
    if kinds:
        metadata["token_type"] = [1] * len(tokens) + [4, 3, 3, 3]
    sizes = tiny_config("qwen2" if pre == "qwen2" else "llama", vocab_size=len(tokens) + len(added) + 2)
    named = {f"tokenizer__ggml__{key}": value for key, value in metadata.items()}
    write(tmp_path / "m.gguf", random_model(sizes), **named, tokenizer__chat_template=CHAT_TEMPLATE)
    source = open_checkpoint(tmp_path / "m.gguf")
    quantize_model(source, tmp_path / "out", QuantConfig(method="rtn", device="cpu"), [])
    folder = open_checkpoint(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for special in (False, True):
        ids = source.tokenizer().encode(TEXT, allow_special=special)
        assert folder.tokenizer().encode(TEXT, allow_special=special) == ids
    assert theirs.encode(TEXT, add_special_tokens=False) == ids
    assert folder.eos_token_ids == source.eos_token_ids
    messages = [{"role": "user", "content": "hello"}]
    chats = [checkpoint.chat() for checkpoint in (source, folder)]
    rendered = [chat.render(messages).ids for chat in chats if chat is not None]
    assert rendered[0] == rendered[1] == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM" if pre == "qwen2" else "LlamaForCausalLM"]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 64


def test_files_of_a_folder_are_copied(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", hidden_size=64, intermediate_size=96)
    for name in ("chat_template.jinja", "vocab.json", "LICENSE", "tokenization_x.py", "notes.bin", "x.index.json"):
        (source / name).write_text("{{ 1 }}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": "tokenization_x.X"}}))
    quantize_model(open_checkpoint(source), tmp_path / "out", QuantConfig(method="rtn", device="cpu"), [])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"chat_template.jinja", "vocab.json", "LICENSE", "tokenization_x.py", "tokenizer.json"}
    assert not names & {"notes.bin", "x.index.json"}
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == json.loads((source / "generation_config.json").read_text())["eos_token_id"]
