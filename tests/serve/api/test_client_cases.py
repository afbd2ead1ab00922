"""What clients send and models write, as data in tests/data/cases: each case holds, and so do its neighbours."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwenkit.cli.main import cli
from qwenkit.engine.config import EngineConfig
from qwenkit.engine.llm import LLM
from qwenkit.model.config import ModelConfig
from qwenkit.serve.config import ServeConfig
from qwenkit.serve.process import make_server
from qwenkit.text.chat import JinjaChat
from qwenkit.text.chat_qwen1 import Qwen1Chat
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.weights.checkpoint import open_checkpoint
from qwenkit.weights.load import load_model
from tests.hub.hub_server import hub_server, use_hub
from tests.serve.api.client_cases import Case, Outcome, read_cases, send
from tests.serve.api.conftest import TEMPLATE
from tests.serve.conftest import LiveServer, running, servers
from tests.serve.scripted import ScriptedEngine
from tests.tiny_models import EOS, IM_END, tiny_reference, write_tokenizer
from tests.weights.test_gguf_model import ARCHITECTURES, llama_cpp_tensors, random_model, tiny_config, write

CASES = read_cases()
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NOT_HERE = ("auto-round-in-gptq-layout", "gguf-iq4-nl", "mirror-redirects")
"""Cases that have tests of their own beside the readers: test_gptq_awq.py, test_foreign_files.py, tests/hub."""


def chosen(*how: str) -> Any:
    found = [case for case in CASES if case.how in how and not case.fields["name"].startswith(NOT_HERE)]
    assert found
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


Scripted = Callable[[Case], LiveServer]


@pytest.fixture(scope="module")
def scripted(thinker: Tokenizer, tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Iterator[Scripted]:
    """A server with a scripted engine for the template, speed and context that a case wants; one for all that want the same."""
    found: dict[tuple[Any, ...], LiveServer] = {}
    with ExitStack() as stack:

        def give(case: Case) -> LiveServer:
            template = case.fields.get("template") or TEMPLATE
            if template.startswith("fixture:"):
                template = (data_folder / "templates" / template.removeprefix("fixture:")).read_text()
            wanted = template, case.fields.get("seconds_a_token", 0.0), case.fields.get("max_model_len", 4096)
            if wanted not in found:
                engine = ScriptedEngine(thinker, seconds=wanted[1], max_model_len=wanted[2])
                make = stack.enter_context(servers(thinker, tmp_path_factory.mktemp("state")))
                server = make(engine=engine, tokenizer=thinker, chat_format=JinjaChat(thinker, template))
                found[wanted] = stack.enter_context(running(server))
            return found[wanted]

        yield give


@chosen("scripted")
def test_scripted(case: Case, scripted: Scripted) -> None:
    live = scripted(case)
    done: list[Outcome] = []
    for step in case.steps:
        live.engine._scripts = [step.get("says", "Hello!")]
        before = len(live.engine.asked)
        outcome = send(live, step, done)
        if len(live.engine.asked) > before:
            asked = live.engine.asked[-1]
            outcome["prompt"] = live.server.tokenizer.decode(asked.prompt, skip_special=False)
            outcome["grammar"] = None if asked.params.grammar is None else str(asked.params.grammar)
            outcome["max_tokens"] = asked.params.max_tokens
        done.append(outcome)
    assert not case.why_wrong(done, {})


def serve_model(path: Path, state: Path, stack: ExitStack, *flags: str) -> LiveServer:
    length = int(flags[flags.index("--max-model-len") + 1]) if "--max-model-len" in flags else None
    llm = LLM(path, EngineConfig(max_model_len=length, kv_memory="256MiB", max_num_seqs=4))
    server = make_server(llm, ("tiny", "smollm2"), ServeConfig(port=0, state_dir=str(state)))
    assert server.compiler is not None
    stack.callback(server.compiler.close)
    return stack.enter_context(running(server))


@pytest.fixture(scope="module")
def smollm2(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with ExitStack() as stack:
        yield serve_model(default_model, tmp_path_factory.mktemp("state"), stack, "--max-model-len", "2048")


@chosen("smollm2")
def test_default_model(case: Case, smollm2: LiveServer) -> None:
    done: list[Outcome] = []
    for step in case.steps:
        done.append(send(smollm2, step, done))
    assert not case.why_wrong(done, {})


@chosen("folder", "gguf")
def test_model_files(case: Case, tmp_path: Path) -> None:
    path = write_folder(case, tmp_path / "model") if case.how == "folder" else write_gguf(case, tmp_path)
    look = looked(case, path)
    done: list[Outcome] = []
    if case.fields.get("command"):
        words = [word.replace("$MODEL", str(path)) for word in case.fields["command"]]
        result = CliRunner().invoke(cli, words, input="")
        done.append({"status": result.exit_code, "out": result.stdout, "err": result.stderr})
    with ExitStack() as stack:
        if case.steps:
            live = serve_model(path, tmp_path / "state", stack, *case.fields.get("flags", ()))
        for step in case.steps:
            done.append(send(live, step, done))
        assert not case.why_wrong(done, look)


@chosen("hub")
def test_hub(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = case.fields["files"]
    with hub_server({files["repo"]: {name: name.encode() * 9 for name in files["names"]}}) as hub:
        use_hub(monkeypatch, tmp_path, hub.url)
        result = CliRunner().invoke(cli, case.fields["command"])
    outcome = {"status": result.exit_code, "out": result.stdout, "err": result.stderr}
    assert not case.why_wrong([outcome], {})


@chosen("qwen1")
def test_first_generation(case: Case, tokenizer: Tokenizer) -> None:
    ids = Qwen1Chat(tokenizer, max_window_size=6144).render(case.fields["messages"]).ids
    text = tokenizer.decode(ids, skip_special=False)
    assert not case.why_wrong([], {"render": text})
    for message in case.fields["messages"]:
        assert message["content"] in text


def write_folder(case: Case, folder: Path) -> Path:
    """A tiny random model, with the files of a case changed."""
    files = case.fields["files"]
    size = {"max_shard_size": files["max_shard_size"]} if "max_shard_size" in files else {}
    tiny_reference(files["model_type"], **files.get("changes", {})).save_pretrained(folder, **size)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, IM_END], "do_sample": False}))
    write_tokenizer(folder)
    for name, edit in files.get("edit", {}).items():
        held = json.loads((folder / name).read_text())
        for key in edit.get("remove", ()):
            held.pop(key, None)
        for key, value in edit.get("set", {}).items():
            *above, last = key.split("/")
            inner = held
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = value
        (folder / name).write_text(json.dumps(held))
    for name in files.get("delete", ()):
        (folder / name).unlink()
    for pattern, new in files.get("rename_tensors", ()):
        weights = folder / "model.safetensors"
        renamed = {re.sub(pattern, new, name): tensor.clone() for name, tensor in load_file(weights).items()}
        save_file(renamed, weights, metadata={"format": "pt"})
    return folder


def write_gguf(case: Case, folder: Path) -> Path:
    """A tiny random model as one .gguf, or as the parts of one."""
    files = case.fields["files"]
    specials, extra = files.get("specials", CONTROL), files.get("extra_tokens", ["qz"])
    tokens = [*(bytes_to_unicode()[byte] for byte in range(256)), *specials, *extra]
    metadata: dict[str, Any] = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [1] * 256 + [3] * len(specials) + [1] * len(extra),
        "tokenizer__ggml__merges": files.get("merges", ["q z"]),
    } | {name.replace(".", "__"): value for name, value in files.get("metadata", {}).items()}
    model = random_model(tiny_config(files.get("model_type", "qwen2"), vocab_size=len(tokens)))
    if "parts" not in files:
        write(folder / "model.gguf", model, **metadata)
        return folder / "model.gguf"
    held = llama_cpp_tensors(model, ARCHITECTURES[model.config.model_type])
    names, count = list(held), files["parts"]
    for number, part in enumerate(np.array_split(names, count)):
        split = {"split__no": number, "split__count": count, "split__tensors__count": len(names)}
        path = folder / f"model-{number + 1:05}-of-{count:05}.gguf"
        write(path, model, tensors={name: held[name] for name in part}, **({} if number else metadata), **split)
    return folder / f"model-00001-of-{count:05}.gguf"


def looked(case: Case, path: Path) -> Outcome:
    """What a case wants to see of the files; a refusal or a warning is something to see, too."""
    found: Outcome = {}
    for name, wanted in case.fields.get("look", {}).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found[name] = see(name, wanted, path)
            except ValueError as error:
                found[f"{name}_error"] = str(error)
        if caught:
            found[f"{name}_warnings"] = [str(warning.message) for warning in caught]
    return found


def see(name: str, wanted: Any, path: Path) -> Any:
    checkpoint = open_checkpoint(path)
    if name == "eos_token_ids":
        return sorted(checkpoint.eos_token_ids)
    if name == "rope":
        return asdict(ModelConfig.from_dict(checkpoint.config).rope)
    if name == "encode":
        return checkpoint.tokenizer().encode(wanted)
    assert name == "load"
    return {"parameters": sum(parameter.numel() for parameter in load_model(path).parameters())}
