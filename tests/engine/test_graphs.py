"""The native library under the engine: recorded decode steps give the tokens that the model's code gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenkit import LLM
from qwenkit.engine.batch import Computed
from qwenkit.engine.sampling import SamplingParams
from qwenkit.engine.scheduler import Row
from qwenkit.model.config import ModelConfig
from qwenkit.model.qwen import Qwen
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from qwenkit.weights.pack import packing
from tests.engine.conftest import MakeEngine, run, tokens_of
from tests.tiny_models import write_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
VARIANTS = {
    "llama": SIZES,
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": SIZES,
}


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def models(
    request: pytest.FixtureRequest, instruction_set: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Qwen]:
    """One packed model of each variant."""
    packed = {}
    for name, changes in VARIANTS.items():
        folder = write_model(tmp_path_factory.mktemp(name), name, **changes)
        checkpoint = open_checkpoint(folder)
        swap = packing(ModelConfig.from_dict(checkpoint.config), request.param)
        packed[name] = load_model(checkpoint, dtype=torch.float32, swaps=[swap]).eval()
    return packed


def by_full_prefills(make_engine: MakeEngine, model: Qwen, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by a whole prefill for each token. Activations are rounded to int8, where a difference in the last bit of
    attention may grow; so this goes through the same attention kernel, and the tokens must be equal without exception.
    """
    engine = make_engine(model, num_blocks=64, block_size=16, max_batch_tokens=1024, prefix_cache=False, graphs=False)
    tokens = list(prompt)
    for _ in range(count):
        request_id = engine.add(tokens, SamplingParams(max_tokens=1))
        tokens += tokens_of(run(engine)[request_id, 0])
        if tokens[-1] in engine.eos_ids:
            break
    return tokens[len(prompt) :]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=30), min_size=1, max_size=7),
    chunk=st.integers(1, 40),
    block_size=st.sampled_from([1, 4, 16]),
    prefix_cache=st.booleans(),
    spare_blocks=st.integers(0, 12),
    max_tokens=st.integers(1, 12),
    graphs=st.booleans(),
)
def test_greedy_tokens_equal_naive_decoding(
    make_engine: MakeEngine,
    models: dict[str, Qwen],
    variant: str,
    prompts: list[list[int]],
    chunk: int,
    block_size: int,
    prefix_cache: bool,
    spare_blocks: int,
    max_tokens: int,
    graphs: bool,
) -> None:
    """As on the reference, with recording on and off."""
    model = models[variant]
    longest = max(map(len, prompts)) + max_tokens
    engine = make_engine(
        model,
        num_blocks=-(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_batch_tokens=chunk,
        prefix_cache=prefix_cache,
        graphs=graphs,
    )
    ids = [engine.add(prompt, SamplingParams(max_tokens=max_tokens)) for prompt in prompts]
    deltas = run(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(deltas[request_id, 0]) == by_full_prefills(make_engine, model, prompt, max_tokens)


def test_decode_steps_are_replayed(make_engine: MakeEngine, models: dict[str, Qwen]) -> None:
    """Every variant can be recorded, and steps of any number of rows are served from few recordings."""
    for model in models.values():
        engine = make_engine(model, num_blocks=200, max_model_len=64)
        for count in (1, 3, 5, 11):
            for place in range(count):
                engine.add([place, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
            run(engine)
        graphs = engine.runner.graphs
        assert graphs is not None
        assert sorted(graphs._steps) == [1, 3, 6, 12]


def test_tokens_drawn_in_a_replay_are_those_drawn_after_it(make_engine: MakeEngine, models: dict[str, Qwen]) -> None:
    """A recorded step draws by itself while only penalties change its rows' logits, and the rows' settings come and go."""
    wishes = [
        SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=9, temperature=1.0, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.5, top_k=20, top_p=0.7, seed=2, ignore_eos=True),
        SamplingParams(max_tokens=14, temperature=0.8, min_p=0.1, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=1.0, seed=4, frequency_penalty=1.5, ignore_eos=True),
        SamplingParams(max_tokens=10, temperature=0.0, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=1.2, seed=5, presence_penalty=0.7, top_k=30, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=5, temperature=0.0, logit_bias={7: 4.0}, ignore_eos=True),
    ]
    for model in models.values():
        answers = []
        for graphs in (True, False):
            engine = make_engine(model, num_blocks=64, graphs=graphs)
            ids = [engine.add([place, 2, 3], params) for place, params in enumerate(wishes)]
            deltas = run(engine)
            answers.append([tokens_of(deltas[request_id, 0]) for request_id in ids])
        assert answers[0] == answers[1]


def test_penalties_do_not_keep_a_step_from_drawing_by_itself(
    make_engine: MakeEngine, models: dict[str, Qwen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are most Qwen models' own defaults."""
    engine = make_engine(models["qwen2"], num_blocks=64)
    graphs = engine.runner.graphs
    assert graphs is not None
    drawn: list[bool] = []
    run_graphs = graphs.run

    def watched(rows: list[Row]) -> Computed | None:
        computed = run_graphs(rows)
        if computed is not None:
            drawn.append(computed.tokens is not None)
        return computed

    monkeypatch.setattr(graphs, "run", watched)
    engine.add(
        [1, 2, 3], SamplingParams(max_tokens=6, repetition_penalty=1.05, top_k=20, temperature=0.7, ignore_eos=True)
    )
    run(engine)
    assert drawn == [True] * 5


def test_a_request_alone_and_in_a_batch_gives_the_same_tokens(make_engine: MakeEngine, models: dict[str, Qwen]) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.9, seed=5, ignore_eos=True)
    engine = make_engine(models["qwen3"], num_blocks=64)
    alone_id = engine.add([9, 8, 7], params)
    alone = tokens_of(run(engine)[alone_id, 0])
    for others in range(1, 6):
        for other in range(others):
            engine.add([other] * (other + 1), SamplingParams(max_tokens=12, ignore_eos=True))
        together_id = engine.add([9, 8, 7], params)
        assert tokens_of(run(engine)[together_id, 0]) == alone


def test_models_that_cannot_be_recorded_run_all_the_same(
    instruction_set: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Experts are chosen by the data, so their steps go through the model's code, with native ops inside."""
    checkpoint = open_checkpoint(write_model(tmp_path, "qwen3_moe", **SIZES, moe_intermediate_size=32))
    swap = packing(ModelConfig.from_dict(checkpoint.config), "int8")
    model = load_model(checkpoint, dtype=torch.float32, swaps=[swap]).eval()
    engine = make_engine(model, num_blocks=64)
    request_id = engine.add([1, 2, 3], SamplingParams(max_tokens=8))
    assert tokens_of(run(engine)[request_id, 0]) == by_full_prefills(make_engine, model, [1, 2, 3], 8)


def test_llm_packs_by_itself(instruction_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENKIT_OPS", instruction_set)
    folder = write_model(tmp_path, "qwen2", **SIZES)
    texts = {
        weights: LLM(folder, weights=weights, max_model_len=64).generate("abc", SamplingParams(max_tokens=8))[0].text
        for weights in ("auto", "bf16", "float")
    }
    assert texts["auto"] == texts["bf16"]
    with pytest.raises(ValueError, match=r"weights is 'int4', which needs device cpu and dtype auto or float32"):
        LLM(folder, weights="int4", dtype="bfloat16")


def test_answering_imports_neither_compiler_nor_hub(tmp_path: Path) -> None:
    """Torch's compiler takes seconds to import and tens of megabytes, and nothing here compiles; the hubs' clients take 0.2 s,
    and the model is on this disk.
    """
    write_model(tmp_path, "qwen3", **SIZES)
    code = (
        "import sys; from qwenkit import LLM, SamplingParams; "
        f"llm = LLM({str(tmp_path)!r}, device='cpu', weights='int8', kv_memory='4MiB'); "
        "llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True, temperature=0)); "
        "assert llm.engine.runner.graphs is None or llm.engine.runner.graphs._steps; "
        "print(sorted({'torch._dynamo', 'huggingface_hub', 'httpx'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
