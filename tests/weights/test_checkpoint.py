"""What else a model on disk says: its tokenizer, how conversations are written, where an answer ends."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers

from qwenkit.text.chat import JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.gguf_file import read_gguf
from qwenkit.weights.gguf_model import GgufCheckpoint
from tests.tiny_models import CHAT_TEMPLATE, EOS, IM_END, SPECIAL_TOKENS, write_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
ENDS = (IM_END, EOS)


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    write(tmp_path, "tokenizer_config.json", {})
    write(tmp_path, "config.json", {"model_type": "qwen2"})
    return tmp_path


def rendered(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    chat = checkpoint.chat()
    assert chat is not None
    return checkpoint.tokenizer().decode(chat.render(MESSAGES).ids, skip_special=False)


def test_the_tokenizer_is_read_once(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer() is checkpoint.tokenizer()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [4, 2, 4]}, "config.json": {"eos_token_id": 9}}, (4, 2, 9, *ENDS)),
        ({"generation_config.json": {"eos_token_id": 3}}, (3, *ENDS)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 9}}, (9, *ENDS)),
        ({"config.json": {"eos_token_id": [0, 9]}}, (0, 9, *ENDS)),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, ENDS),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}}}, (EOS, IM_END)),
        (
            {"generation_config.json": {"eos_token_id": EOS}, "tokenizer_config.json": {"eos_token": "!"}},
            (EOS, 0, IM_END),
        ),
        ({"tokenizer_config.json": {"eos_token": "<|unheard of|>"}}, ENDS),
        ({}, ENDS),
    ],
)
def test_end_tokens(folder: Path, files: dict[str, dict[str, Any]], expected: tuple[int, ...]) -> None:
    for name, value in files.items():
        write(folder, name, value)
    assert open_checkpoint(folder).eos_token_ids == expected


def test_ends_of_fill_in_the_middle_are_ends_however_they_are_marked(folder: Path) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    for id, token in enumerate(("<|fim_prefix|>", "<|fim_pad|>", "<|file_sep|>", "<|repo_name|>"), IM_END + 1):
        data["added_tokens"].append(data["added_tokens"][0] | {"id": id, "content": token, "special": id % 2 == 0})
    write(folder, "tokenizer.json", data)
    assert open_checkpoint(folder).eos_token_ids == (*ENDS, IM_END + 2, IM_END + 3, IM_END + 4)


def test_a_folder_without_a_tokenizer_has_the_ends_that_it_names(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    write(folder, "config.json", {"eos_token_id": 9})
    assert open_checkpoint(folder).eos_token_ids == (9,)


@pytest.mark.parametrize("value", ["2", [2, "3"], True, -1, {"a": 1}])
def test_end_tokens_of_another_kind_are_named(folder: Path, value: Any) -> None:
    write(folder, "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id or a list"):
        _ = open_checkpoint(folder).eos_token_ids


def test_qwen1_chat_and_base(folder: Path) -> None:
    write(folder, "config.json", {"model_type": "qwen"})
    write(folder, "generation_config.json", {"chat_format": "chatml", "eos_token_id": 7, "max_window_size": 24000})
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint.chat(), Qwen1Chat)
    assert checkpoint.eos_token_ids == (7, IM_END, EOS)
    write(folder, "generation_config.json", {"chat_format": "chatml", "max_window_size": 0})
    with pytest.raises(ValueError, match=r"generation_config\.json: max_window_size is 0"):
        open_checkpoint(folder).chat()
    write(folder, "generation_config.json", {"chat_format": "raw", "eos_token_id": EOS})
    assert open_checkpoint(folder).chat() is None
    assert open_checkpoint(folder).eos_token_ids == (EOS, IM_END)


def test_templates(folder: Path) -> None:
    assert open_checkpoint(folder).chat() is None
    write(folder, "tokenizer_config.json", {"chat_template": CHAT_TEMPLATE})
    assert isinstance(open_checkpoint(folder).chat(), JinjaChat)
    assert rendered(folder).startswith("<|im_start|>user\nHi<|im_end|>\n")
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "list: {{ messages[0].content }}"},
    ]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert rendered(folder) == "list: Hi"
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True}
    write(folder, "tokenizer_config.json", tokens | {"chat_template": "{{ bos_token }}!{{ eos_token }}{{ pad_token }}"})
    assert rendered(folder) == "<|im_start|>!<|im_end|>"
    write(folder, "chat_template.jinja", "file: {{ messages[0].content }}")
    assert rendered(folder) == "file: Hi"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (3, "must be a string or a list"),
        ([{"name": "rag", "template": ""}], r"lists \['rag'\], but none is named 'default'"),
    ],
)
def test_templates_of_another_form_are_named(folder: Path, template: Any, words: str) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: chat_template {words}"):
        open_checkpoint(folder).chat()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_named(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} (is not valid JSON|must hold a JSON object)"):
        open_checkpoint(folder).chat()


def test_a_template_file_of_other_bytes_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not valid UTF-8"):
        open_checkpoint(folder).chat()


def test_a_folder_of_gguf_files_is_pointed_into(tmp_path: Path) -> None:
    write(tmp_path, "tiny-Q4_1.gguf", "")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.* it holds tiny-Q4_1\.gguf"):
        open_checkpoint(tmp_path)


def gguf_checkpoint(path: Path, **metadata: Any) -> GgufCheckpoint:
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in metadata.items():
        add = {list: writer.add_array, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufCheckpoint(path, read_gguf(path), {"model_type": "qwen2"})


def bpe() -> dict[str, Any]:
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + SPECIAL_TOKENS
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "qwen2",
        "tokenizer__ggml__tokens": [*tokens, "Hi"],
        "tokenizer__ggml__token_type": [1] * 256 + [3] * len(SPECIAL_TOKENS) + [1],
        "tokenizer__ggml__merges": ["H i"],
    }


def test_gguf_tokenizer_and_template(tmp_path: Path) -> None:
    checkpoint = gguf_checkpoint(tmp_path / "x.gguf", **bpe(), tokenizer__chat_template=CHAT_TEMPLATE)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.encode("Hi<|im_end|>", allow_special=True) == [256 + len(SPECIAL_TOKENS), IM_END]
    chat = checkpoint.chat()
    assert isinstance(chat, JinjaChat)
    assert tokenizer.decode(chat.render(MESSAGES).ids, skip_special=False).startswith("<|im_start|>user\nHi<|im_end|>")
    template = "{{ bos_token }}!{{ eos_token }}{{ unk_token }}"
    named = {"tokenizer__ggml__bos_token_id": EOS, "tokenizer__ggml__eos_token_id": IM_END}
    checkpoint = gguf_checkpoint(tmp_path / "z.gguf", **bpe(), **named, tokenizer__chat_template=template)
    chat = checkpoint.chat()
    assert chat is not None
    assert checkpoint.tokenizer().decode(chat.render(MESSAGES).ids, skip_special=False) == "<|endoftext|>!<|im_end|>"
    assert gguf_checkpoint(tmp_path / "y.gguf", **bpe()).chat() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer__ggml__model": "llama"}, r"tokenizer\.ggml\.model is 'llama', but only 'gpt2'"),
        ({"tokenizer__ggml__tokens": [1, 2]}, r"tokenizer\.ggml\.tokens must be a list of str"),
        ({"tokenizer__ggml__merges": "H i"}, r"tokenizer\.ggml\.merges must be a list of str"),
        ({"tokenizer__ggml__token_type": ["a"]}, r"tokenizer\.ggml\.token_type must be a list of int"),
    ],
)
def test_gguf_vocabularies_that_cannot_be_read_are_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gguf_checkpoint(tmp_path / "x.gguf", **(bpe() | change)).tokenizer()
