"""The default model end to end: its greedy words equal those of transformers reading the same file."""

from pathlib import Path

import pytest
import torch
import transformers

from qwenkit import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are:\n1.",
    "Q: Why is the sky blue?\nA:",
]
NUM_TOKENS = 64


@pytest.mark.filterwarnings("ignore")  # transformers' own, while it reads a GGUF
def test_greedy_continuations_equal_transformers(default_model: Path) -> None:
    llm = LLM(default_model, dtype="float32", max_model_len=512)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, min_tokens=NUM_TOKENS, max_tokens=NUM_TOKENS))
    ours = [output.completions[0].token_ids for output in outputs]
    prompts = [output.prompt_token_ids for output in outputs]
    ends = sorted(llm.engine.eos_ids)
    del llm
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).eval()
    for prompt, continuation in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=ends,
            pad_token_id=0,
        )
        assert continuation == theirs[0, len(prompt) :].tolist()


def test_a_sensible_answer(default_model: Path) -> None:
    llm = LLM(default_model, max_model_len=256)
    (output,) = llm.chat(
        [{"role": "user", "content": "What is the capital of Germany?"}], SamplingParams(max_tokens=40)
    )
    assert "Berlin" in output.text
    assert output.completions[0].finish_reason == "stop"
