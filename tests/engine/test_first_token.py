"""Prompts and scores of a text begin with the token that the tokenizer's files put there; ids and conversations are as given."""

import json
from pathlib import Path

from qwenkit import LLM
from tests.tiny_models import EOS, IM_START, write_model


def test_texts_begin_with_it_ids_and_conversations_do_not(tmp_path: Path) -> None:
    write_model(tmp_path)
    path = tmp_path / "tokenizer.json"
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [EOS], "tokens": ["<|endoftext|>"]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))
    llm = LLM(tmp_path, weights="float", dtype="float32")
    plain = llm.tokenizer.encode("in it")
    assert llm.encode("in it") == [EOS, *plain]
    assert llm.generate("in it")[0].prompt_token_ids == [EOS, *plain]
    assert llm.score("in it")[0].token_ids == [EOS, *plain]
    assert llm.encode(plain) == plain
    assert llm.encode([{"role": "user", "content": "in it"}])[0] == IM_START
