"""Private interfaces of other libraries that the package uses: each is exercised here, so that a release that changes one fails
here first and by name. pyproject.toml bounds the versions of these libraries from above.

A private interface is a name with a leading underscore, or one that the library does not document. The list is complete for the
former: the package's source is searched for them.
"""

import ast
import asyncio
import ctypes
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT

SOURCES = sorted((ROOT / "src" / "qwenkit").rglob("*.py"))
DOCUMENTED = {"os._exit"}


def fused_adamw() -> None:
    """train.optim: the kernel of AdamW(fused=True), with these arguments."""
    weight, grad, first, second = (torch.full((3,), value) for value in (1.0, 0.5, 0.0, 0.0))
    step = torch.tensor(1.0)
    torch._fused_adamw_(
        *([weight], [grad], [first], [second], [], [step]),
        lr=0.1,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.0,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    assert weight.tolist() == pytest.approx([0.9] * 3, abs=1e-6)
    assert first.tolist() == pytest.approx([0.05] * 3)


def int_mm() -> None:
    """cli.bench: products in int8."""
    a, b = torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 32, dtype=torch.int8)
    assert torch._int_mm(a, b).eq(32).all()


def cpu_features() -> None:
    """engine.memory: what the CPU has."""
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_amx_tile_supported(), bool)


def tensor_version() -> None:
    """ops.cpu.native: goes up with each write in place."""
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


def module_internals() -> None:
    """train.parallel.slices: a module's own dictionaries, and a function applied to each tensor in place."""
    module = nn.Linear(2, 3)
    assert set(module._parameters) == {"weight", "bias"}
    assert nn.Sequential(module)._modules == {"0": module}
    module._apply(lambda tensor: tensor.double())
    assert module.weight.dtype == torch.float64


def dispatch_mode() -> None:
    """engine.graphs and train.plan: a mode sees each operator; the method that keeps torch's compiler away exists."""
    assert isinstance(inspect.getattr_static(TorchDispatchMode, "_should_skip_dynamo"), classmethod)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).view(2)
    assert seen == ["ones", "view"]


def local_shape_and_offset() -> None:
    """train.parallel.sharded: where a process's part of a DTensor begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert list(inspect.signature(compute_local_shape_and_global_offset).parameters)[:3] == [
        *("global_shape", "mesh", "placements"),
    ]


def openmp_runtime() -> None:
    """ops.cpu.training: torch's OpenMP runtime, by the symbols of GCC's."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    assert all(getattr(library, name) for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"))


def uvicorn_protocol() -> None:
    """serve.listener: attributes and methods of uvicorn's HTTP protocol, and of the request that it is at."""
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
    from uvicorn.server import ServerState

    async def make() -> HttpToolsProtocol:
        config = uvicorn.Config(lambda *_: None, log_config=None)  # type: ignore[arg-type,return-value]
        config.load()
        return HttpToolsProtocol(config, ServerState(), {})

    protocol = asyncio.run(make())
    assert protocol.cycle is None
    assert protocol.connections == set()
    for name in ("loop", "transport"):
        assert hasattr(protocol, name), name
    for name in ("connection_made", "connection_lost", "data_received", "on_headers_complete", "on_message_complete"):
        assert name in vars(HttpToolsProtocol), name
    for name in ("pause_writing", "resume_writing"):
        assert name in vars(HttpToolsProtocol), name
    assert "response_complete" in inspect.getsource(RequestResponseCycle.__init__)
    assert list(inspect.signature(uvicorn.Server.startup).parameters) == ["self", "sockets"]
    assert list(inspect.signature(uvicorn.Server.handle_exit).parameters) == ["self", "sig", "frame"]
    for name in ("started", "should_exit", "force_exit"):
        assert hasattr(uvicorn.Server(uvicorn.Config("x:y", log_config=None)), name), name


# What is tried, and the names with a leading underscore that it covers.
INTERFACES: dict[Callable[[], None], set[str]] = {
    fused_adamw: {"torch._fused_adamw_"},
    int_mm: {"torch._int_mm"},
    cpu_features: {"torch.cpu._is_avx512_bf16_supported", "torch.cpu._is_amx_tile_supported"},
    tensor_version: {"_version"},
    module_internals: {"_modules", "_parameters", "_apply"},
    dispatch_mode: {"torch.utils._python_dispatch.TorchDispatchMode", "TorchDispatchMode._should_skip_dynamo"},
    local_shape_and_offset: {"torch.distributed.tensor._utils.compute_local_shape_and_global_offset"},
    openmp_runtime: set(),
    uvicorn_protocol: set(),
}


@pytest.mark.parametrize("interface", INTERFACES, ids=lambda interface: interface.__name__)
def test_the_interface_is_what_the_package_takes_it_for(interface: Callable[[], None]) -> None:
    interface()


def test_the_list_is_complete() -> None:
    """Every private name of another library in the source is covered by an interface of the list, and none is listed in vain."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}
    found: dict[str, str] = {}
    for path, tree in trees.items():
        for name in set(foreign(tree, set(defined(tree)))) - DOCUMENTED:
            found.setdefault(name, str(path.relative_to(ROOT)))
    listed = set().union(*INTERFACES.values())
    missing = {name: where for name, where in found.items() if name not in listed}
    assert not missing, f"private interfaces that no test exercises: {missing}"
    assert listed - {"_cdata"} <= found.keys(), f"listed, but not used any more: {listed - found.keys()}"


def test_the_search_finds_what_there_can_be() -> None:
    text = """
import torch, numpy as np
from torch._inductor import config
from uvicorn import Server
_hidden = getattr(torch._C, "_x", None)
np.core._y
class Own(Server):
    def _serve(self): return self._mine + self.other._theirs
    def _fine(self): self._mine = 1
"""
    tree = ast.parse(text)
    assert set(foreign(tree, set(defined(tree)))) == {
        *("torch._inductor.config", "torch._C", "_x", "numpy.core._y", "Server._serve", "_theirs"),
    }


def defined(tree: ast.AST) -> Iterator[str]:
    """Private names that a file defines: functions, classes, variables, fields, attributes that are assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of other libraries that a file imports, reads, asks for with getattr, or overrides."""
    modules: dict[str, str] = {}  # local name -> dotted name in another library
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules[(alias.asname or alias.name).partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    modules = {
        name: whole for name, whole in modules.items() if whole.partition(".")[0] not in ("qwenkit", "__future__")
    }
    for whole in modules.values():
        if any(is_private(part) for part in whole.split(".")):
            yield whole
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root, *rest = ast.unparse(node).split(".")
            if root in modules and all(part.isidentifier() for part in rest):
                yield ".".join((modules[root], *rest[: rest.index(node.attr) + 1]))
            elif node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in own:
                yield str(name.value)
        elif isinstance(node, ast.ClassDef):
            yield from overridden(node, modules)


def overridden(node: ast.ClassDef, modules: dict[str, str]) -> Iterator[str]:
    for expression in node.bases:
        root, *rest = ast.unparse(expression).split(".")
        if root not in modules:
            continue
        module, _, name = ".".join((modules[root], *rest)).rpartition(".")
        try:
            base = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            continue
        for each in node.body:
            if (
                isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                and is_private(each.name)
                and hasattr(base, each.name)
            ):
                yield f"{name}.{each.name}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def test_libraries_whose_private_interfaces_are_used_are_bounded() -> None:
    """From above, and so that what is installed lies within."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    requirements = [Requirement(found) for found in re.findall(r'^ +"([a-z][^"\n]*[<>=][^"\n]*)",', text, re.MULTILINE)]
    roots = {
        name.partition(".")[0] for names in INTERFACES.values() for name in names if "." in name and name[0] != "_"
    }
    assert roots - {"TorchDispatchMode"} == {"torch"}
    for library in ("torch", "uvicorn"):
        (requirement,) = [each for each in requirements if each.name == library]
        assert "<" in {specifier.operator for specifier in requirement.specifier}, library
        installed = Version(Version(version(library)).public)
        assert installed in requirement.specifier, f"{library} {installed} is outside of {requirement}"
