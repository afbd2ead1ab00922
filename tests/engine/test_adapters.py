"""Adapters in the engine: every row of a batch gets what it would get alone, and nothing of one adapter reaches another."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwenkit import LLM, ops
from qwenkit.engine.engine import Engine
from qwenkit.engine.sampling import SamplingParams
from qwenkit.linear.lora import AdaptedLinear, linears
from qwenkit.model.qwen import Qwen
from qwenkit.ops.cpu.library import open_library
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.repacked import load_packed
from tests.conftest import OPS
from tests.engine.conftest import MakeEngine, naive_greedy, run, tokens_of
from tests.tiny_models import tiny_pair, write_model
from tests.weights.test_adapter import save_adapter

TARGETS = {"poet": ["q_proj", "v_proj", "down_proj"], "clerk": ["o_proj", "v_proj", "up_proj"]}
LENGTH = 12
GREEDY = SamplingParams(max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the tiny qwen2, by name."""
    folders = {}
    for seed, (name, targets) in enumerate(TARGETS.items(), start=1):
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(tiny_pair("qwen2")[0], folders[name], seed=seed, r=2 + seed, target_modules=targets)
    return folders


@pytest.fixture(scope="module")
def merged(adapters: dict[str, Path]) -> dict[str | None, Qwen]:
    """The model alone, and with each adapter merged into its weights by hand."""
    models: dict[str | None, Qwen] = {None: tiny_pair("qwen2")[1]}
    for seed, (name, targets) in enumerate(TARGETS.items(), start=1):
        reference = tiny_pair("qwen2")[0]
        state = save_adapter(
            reference, adapters[name], seed=seed, r=2 + seed, target_modules=targets
        ).merge_and_unload()
        models[name] = copy.deepcopy(models[None])
        models[name].load_state_dict(state.state_dict())
    return models


MakeAdapted = Callable[..., Engine]


@pytest.fixture
def make(make_engine: MakeEngine, adapters: dict[str, Path]) -> MakeAdapted:
    def make_adapted(names: tuple[str, ...] = ("poet", "clerk"), **settings: Any) -> Engine:
        engine = make_engine(tiny_pair("qwen2")[1], **({"num_blocks": 64, "max_batch_tokens": 16} | settings))
        for name in names:
            engine.load_adapter(name, adapters[name])
        return engine

    return make_adapted


PROMPTS = [[7, 8, 9, 10, 11], [7, 8, 9, 10, 11], [7, 8, 9, 10, 11], [40], list(range(30, 51)), [3, 5] * 9]
WHO = ["poet", "clerk", None, "clerk", "poet", None]


def answers(
    engine: Engine, prompts: list[list[int]], who: list[Any], params: SamplingParams = GREEDY
) -> list[list[int]]:
    ids = [engine.add(prompt, params, adapter=name) for prompt, name in zip(prompts, who, strict=True)]
    deltas = run(engine)
    return [tokens_of(deltas[request_id, 0]) for request_id in ids]


def test_a_mixed_batch_gives_each_row_its_own(make: MakeAdapted, merged: dict[str | None, Qwen]) -> None:
    """Chunked prompts, decodes and different adapters in one step; against models with the adapter merged in."""
    engine = make()
    assert engine.adapters == ("poet", "clerk")
    expected = [naive_greedy(merged[name], prompt, LENGTH, stop=()) for prompt, name in zip(PROMPTS, WHO, strict=True)]
    assert len({tuple(answer) for answer in expected[:3]}) == 3
    assert answers(engine, PROMPTS, WHO) == expected
    assert [answers(engine, [prompt], [name])[0] for prompt, name in zip(PROMPTS, WHO, strict=True)] == expected


def test_preempted_requests_keep_their_adapter(make: MakeAdapted, merged: dict[str | None, Qwen]) -> None:
    engine = make(num_blocks=12, max_batch_tokens=64)
    expected = [naive_greedy(merged[name], prompt, LENGTH, stop=()) for prompt, name in zip(PROMPTS, WHO, strict=True)]
    assert answers(engine, PROMPTS, WHO) == expected
    assert engine.scheduler.num_preemptions > 0


def test_prompt_logprobs_are_the_adapter_s(
    make: MakeAdapted, make_engine: MakeEngine, merged: dict[str | None, Qwen]
) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(engine: Engine, adapter: str | None) -> list[float]:
        request_id = engine.add(PROMPTS[4], params, adapter=adapter)
        known = run(engine)[request_id, 0][0].prompt_logprobs
        assert known is not None
        return [entry.logprob for entry in known if entry is not None]

    engine = make()
    found = {name: logprobs(engine, name) for name in (None, "poet")}
    for name, values in found.items():
        alone = make_engine(merged[name], num_blocks=64)
        assert values == pytest.approx(logprobs(alone, None), abs=1e-4)
    assert found[None] != pytest.approx(found["poet"], abs=0.01)


def test_several_answers_share_the_adapter(make: MakeAdapted, merged: dict[str | None, Qwen]) -> None:
    engine = make()
    request_id = engine.add([7, 8, 9], SamplingParams(max_tokens=6, n=3, ignore_eos=True), adapter="clerk")
    deltas = run(engine)
    for index in range(3):
        assert tokens_of(deltas[request_id, index]) == naive_greedy(merged["clerk"], [7, 8, 9], 6, stop=())


def test_prefixes_are_shared_only_under_one_adapter(make: MakeAdapted, adapters: dict[str, Path]) -> None:
    engine = make()
    prompt = list(range(30, 51))

    def cached(name: str | None) -> int:
        request_id = engine.add(prompt, GREEDY, adapter=name)
        return run(engine)[request_id, 0][0].num_cached_tokens

    assert [cached(None), cached("poet"), cached("clerk")] == [0, 0, 0]
    assert [cached(None), cached("poet"), cached("clerk")] == [20, 20, 20]
    engine.unload_adapter("poet")
    engine.load_adapter("poet", adapters["clerk"])
    assert cached("poet") == 0, "another adapter under the same name"


def test_without_adapters_the_model_is_as_before(make: MakeAdapted) -> None:
    engine = make(names=())
    before = {name: type(module) for name, module in engine.runner.model.named_modules()}
    base = answers(engine, PROMPTS, [None] * 6)
    assert not any(kind is AdaptedLinear for kind in before.values())
    held = make()
    assert any(isinstance(module, AdaptedLinear) for module in held.runner.model.modules())
    assert answers(held, PROMPTS, [None] * 6) == base
    held.unload_adapter("poet")
    left = {name.rsplit(".", 1)[-1] for name, m in linears(held.runner.model).items() if isinstance(m, AdaptedLinear)}
    assert left == set(TARGETS["clerk"])
    held.unload_adapter("clerk")
    assert {name: type(module) for name, module in held.runner.model.named_modules()} == before
    assert held.adapters == ()


def test_loading_and_unloading_while_others_run(make: MakeAdapted, adapters: dict[str, Path]) -> None:
    expected = answers(make(), [PROMPTS[0], PROMPTS[0]], [None, "poet"])
    engine = make(names=())
    first = engine.add(PROMPTS[0], GREEDY)
    deltas = engine.step() + engine.step()
    engine.load_adapter("poet", adapters["poet"])
    second = engine.add(PROMPTS[0], GREEDY, adapter="poet")
    while engine.has_work:
        with pytest.raises(ValueError, match="adapter 'poet' is in use by 1 requests; unload it when they have ended"):
            engine.unload_adapter("poet")
        deltas += engine.step()
    engine.unload_adapter("poet")
    found = [[t for d in deltas if d.request_id == request_id for t in d.token_ids] for request_id in (first, second)]
    assert found == expected


def test_aborted_requests_do_not_hold_an_adapter(make: MakeAdapted) -> None:
    engine = make()
    request_id = engine.add(PROMPTS[0], GREEDY, adapter="poet")
    engine.step()
    engine.abort(request_id)
    engine.unload_adapter("poet")


def test_names(make: MakeAdapted, adapters: dict[str, Path], tmp_path: Path) -> None:
    engine = make(names=("poet",))
    with pytest.raises(ValueError, match="adapter is 'clerk', loaded are: poet"):
        engine.add([1], adapter="clerk")
    with pytest.raises(ValueError, match="adapter is 'clerk', loaded are: poet"):
        engine.unload_adapter("clerk")
    with pytest.raises(ValueError, match="adapter 'poet' is loaded already"):
        engine.load_adapter("poet", adapters["clerk"])
    with pytest.raises(ValueError, match="adapter is '', a name is needed"):
        engine.load_adapter("", adapters["clerk"])
    with pytest.raises(FileNotFoundError, match="so it is no adapter"):
        engine.load_adapter("clerk", tmp_path)
    assert engine.adapters == ("poet",)
    assert not engine.has_work


def test_updates_of_the_head_are_those_of_each_request(make: MakeAdapted, tmp_path: Path) -> None:
    reference = tiny_pair("qwen2")[0]
    plain = greedy(reference, PROMPTS[1])
    adapted = save_adapter(reference, tmp_path, target_modules=["q_proj", "lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "base_layer" not in name}, path)
    engine = make(names=())
    engine.load_adapter("x", tmp_path)
    found = answers(engine, [PROMPTS[0], PROMPTS[1], PROMPTS[2]], ["x", None, "x"])
    assert found == [greedy(adapted, PROMPTS[0]), plain, greedy(adapted, PROMPTS[2])]
    assert found[1] != greedy(adapted, PROMPTS[1])
    engine.unload_adapter("x")
    assert not any(isinstance(module, AdaptedLinear) for module in engine.runner.model.modules())


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """The likeliest LENGTH tokens after a prompt, by transformers."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(LENGTH):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changed", [False, True])
def test_an_embedding_that_peft_saves_along_is_compared_with_the_models(tmp_path: Path, changed: bool) -> None:
    folder = write_model(tmp_path / "model")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(reference, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        adapted.eval().save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = load_file(path)
    head = next(name for name in saved if "lm_head.base_layer" in name)
    saved[head][3] += 0.01 * changed
    save_file(saved, path)
    llm = LLM(folder, weights="float", dtype="float32")
    if changed:
        with pytest.raises(ValueError, match=r"replaces lm_head\.weight, which is not supported"):
            llm.engine.load_adapter("x", tmp_path / "adapter")
        return
    llm.engine.load_adapter("x", tmp_path / "adapter")
    ids = [5, 9, 200, 31, 7]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    output = llm.generate([ids], params, adapter="x")[0]
    assert output.prompt_logprobs is not None
    found = torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None])
    with torch.no_grad():
        expected = (
            adapted(torch.tensor([ids])).logits[0].log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        )
    assert (found - expected).abs().max() < 1e-3


def test_experts_see_other_rows_than_the_stream_s(make_engine: MakeEngine, tmp_path: Path) -> None:
    """What is beside them can be adapted, they cannot."""
    reference, model = tiny_pair("qwen3_moe")
    adapted = save_adapter(reference, tmp_path, target_modules=["q_proj", "o_proj"])
    engine = make_engine(model, num_blocks=64)
    engine.load_adapter("x", tmp_path)
    (found,) = answers(engine, [PROMPTS[0]], ["x"])
    tokens = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(LENGTH):
            tokens.append(int(adapted(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert found == tokens[len(PROMPTS[0]) :]
    expert = "base_model.model.model.layers.1.mlp.experts.2.up_proj"
    tensors = {f"{expert}.lora_A.weight": torch.ones(4, 32), f"{expert}.lora_B.weight": torch.ones(24, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"target_modules": ["up_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has an update for model\.layers\.1\.mlp\.experts\.2\.up_proj, which cannot"):
        engine.load_adapter("y", tmp_path)


@pytest.mark.parametrize("implementation", ["reference", "avx2", "avx512"])
def test_packed_weights_and_recorded_steps(
    tmp_path: Path, adapters: dict[str, Path], make_engine: MakeEngine, implementation: str
) -> None:
    """Steps without an adapter's row are replayed while adapters are loaded; the answers are those without recording."""
    if implementation != "reference":
        try:
            open_library(implementation)
        except ValueError as error:
            pytest.skip(str(error))
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    checkpoint = open_checkpoint(write_model(tmp_path / "model", **sizes))
    save_adapter(tiny_pair("qwen2", **sizes)[0], tmp_path / "adapter", target_modules="all-linear")
    ops.use(implementation)
    try:
        found = {}
        for graphs in (True, False):
            model = load_packed(checkpoint, "int8", tmp_path / "cache")
            engine = make_engine(model, num_blocks=64, max_batch_tokens=16, graphs=graphs)
            base = answers(engine, PROMPTS, [None] * 6)
            engine.load_adapter("poet", tmp_path / "adapter")
            found[graphs] = answers(engine, PROMPTS, ["poet", None] * 3)
            assert [
                answers(engine, [p], [name])[0] for p, name in zip(PROMPTS, ["poet", None] * 3, strict=True)
            ] == found[graphs]
            assert answers(engine, PROMPTS, [None] * 6) == base
            assert found[graphs][1::2] == base[1::2]
            assert found[graphs][0] != base[0]
            if graphs and implementation != "reference":
                assert engine.runner.graphs is not None
                fresh = make_engine(model, num_blocks=64)
                assert answers(fresh, PROMPTS[:1], [None]) == base[:1]
                assert fresh.runner.graphs is not None
                assert fresh.runner.graphs._steps, "recorded with the adapter in the model"
        assert found[True] == found[False]
    finally:
        ops.use(OPS)


def test_llm(tmp_path: Path, adapters: dict[str, Path], merged: dict[str | None, Qwen]) -> None:
    folder = write_model(tmp_path / "model")
    llm = LLM(folder, lora=adapters, weights="float", dtype="float32", kv_memory="1MiB")
    for name in ("poet", None, "clerk"):
        expected = naive_greedy(merged[name], [7, 8, 9], LENGTH, stop=())
        output = llm.generate([7, 8, 9], GREEDY, adapter=name)[0]
        assert output.completions[0].token_ids == expected
        assert tokens_of(list(llm.stream([7, 8, 9], GREEDY, adapter=name))) == expected
    message = [{"role": "user", "content": "x"}]
    both = [llm.chat(message, GREEDY, adapter=name)[0].completions[0].token_ids for name in ("poet", None)]
    assert both[0] != both[1]
    plain = LLM(folder, weights="float", dtype="float32", kv_memory="1MiB")
    assert llm.score([[7, 8, 9]]) == plain.score([[7, 8, 9]])
    with pytest.raises(ValueError, match="adapter is 'critic', loaded are: poet, clerk"):
        llm.generate("x", adapter="critic")
