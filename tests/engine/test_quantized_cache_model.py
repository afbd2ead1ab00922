"""Quantized key/value caches on the default model: what was said long ago is found again, and a long answer stays the same."""

from pathlib import Path

import pytest

from qwenkit import LLM, SamplingParams

FILLER = [
    "The bus to the harbour leaves at a quarter past every hour.",
    "Rain is expected in the hills, and the paths may be slippery.",
    "The library keeps its oldest maps in a drawer on the second floor.",
    "A new bakery has opened beside the post office.",
    "The ferry was late again, and nobody was surprised.",
]
NEEDLE = "The code of the blue suitcase is 4817."
SENTENCES = 60  # about 800 tokens
COUNTED = 500


@pytest.fixture(scope="module")
def answers(default_model: Path) -> dict[str, tuple[list[str], list[int]]]:
    """By cache type: answers with the needle early, in the middle and late; and the tokens of a long answer."""
    found = {}
    for dtype in ("bfloat16", "int8"):
        llm = LLM(default_model, kv_cache_dtype=dtype, max_model_len=2048, max_num_seqs=3)
        questions = []
        for place in (10, 30, 50):
            lines = [FILLER[(i * 7 + i // 5) % 5] for i in range(SENTENCES)]
            lines.insert(place, NEEDLE)
            text = f"{' '.join(lines)}\n\nWhat is the code of the blue suitcase?"
            questions.append([{"role": "user", "content": text}])
        outputs = llm.chat(questions, SamplingParams(temperature=0, max_tokens=24))
        counting = ", ".join(str(number) for number in range(1, 21)) + ","
        params = SamplingParams(temperature=0, max_tokens=COUNTED, min_tokens=COUNTED)
        (counted,) = llm.generate([counting], params)
        found[dtype] = [output.text for output in outputs], counted.completions[0].token_ids
    return found


def test_a_needle_is_found(answers: dict[str, tuple[list[str], list[int]]]) -> None:
    assert all("4817" in text for text in answers["bfloat16"][0])
    assert answers["int8"][0] == answers["bfloat16"][0]


def test_a_long_answer_stays_the_same(answers: dict[str, tuple[list[str], list[int]]]) -> None:
    """Counting on: each token hangs on the last few numbers, which only the cache knows, and there is no second choice."""
    assert len(set(answers["bfloat16"][1])) > 10
    assert answers["int8"][1] == answers["bfloat16"][1]
