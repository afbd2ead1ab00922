"""`qwenkit doctor`: what qwenkit finds on this machine, for the user and for bug reports.

In: nothing. Out: versions, processor and instruction sets, GPUs, memory, which implementation of each op runs, and the cache
folders, as aligned text or JSON. It changes nothing and downloads nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import click

PACKAGES = (
    *("qwenkit", "torch", "triton", "tokenizers", "tiktoken", "safetensors", "gguf", "numpy", "jinja2"),
    *("huggingface_hub", "modelscope-hub", "httpx", "click", "prompt-toolkit"),
)

# Names in /proc/cpuinfo: the x86 ones that matter to matrix kernels, then ARM's.
INSTRUCTION_SETS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


@click.command(epilog="\b\nExamples:\n  qwenkit doctor\n  qwenkit doctor --json > doctor.json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; sizes are bytes.")
def doctor(as_json: bool) -> None:
    """Show versions, devices, instruction sets, the implementation of each op, memory and cache folders."""
    report = examine()
    click.echo(json.dumps(report, indent=2, ensure_ascii=False) if as_json else as_text(report))


def examine() -> dict[str, dict[str, Any]]:
    """Everything that doctor tells: section -> name -> value; None stands for "not there"."""
    from qwenkit import ops

    ops.use()
    missing = ops.why_no_native()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": machine(),
        "memory": _memory(),
        "gpus": _gpus(),
        "ops": ops.implementations() | ({} if missing is None else {"native": missing}),
        "folders": _folders(),
    }


def as_text(report: dict[str, dict[str, Any]]) -> str:
    """The report with one value a line, names aligned."""
    width = max(len(name) for section in report.values() for name in section) + 2
    lines = []
    for title, section in report.items():
        lines.append(title)
        lines += [f"  {name:<{width}}{_show(name, value)}" for name, value in section.items()]
        if not section:
            lines.append("  none")
    return "\n".join(lines)


def _show(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(key, item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none of those known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value / 2**30:.2f} GiB" if name in ("total", "free", "size", "disk free") else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    import torch

    model, found = _cpuinfo()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable cores": usable,
        "torch threads": torch.get_num_threads(),
        "instruction sets": found,
        "torch capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str | None, list[str]]:
    """Processor name and known instruction sets; nothing where the system has no such file."""
    model, flags = None, set[str]()
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return model, [name for name in INSTRUCTION_SETS if name in flags]


def _memory() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": memory.total, "free": memory.available, "limit of the container": _container_limit()}


def _container_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> str | None:
    """What a container may use, where it is less than everything."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return f"{int(text) / 2**30:.2f} GiB" if text.isdigit() else None


def _gpus() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found[f"cuda:{index}"] = {"name": torch.cuda.get_device_name(index), "total": total, "free": free}
    return found


def _folders() -> dict[str, Any]:
    from huggingface_hub import constants

    from qwenkit.cli.chat import DEFAULT_MODEL
    from qwenkit.hub.find import find_model
    from qwenkit.storage import cache_folder

    own = cache_folder()
    hub = Path(constants.HF_HUB_CACHE)
    try:
        default = str(find_model(DEFAULT_MODEL, download=False))
    except FileNotFoundError:
        default = None
    return {
        "qwenkit": _folder(own),
        "hugging face": _folder(hub),
        "default model": default or "not here yet; the first `qwenkit chat` gets it",
    }


def _folder(path: Path) -> dict[str, Any]:
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return {"path": str(path), "size": _size(path), "disk free": shutil.disk_usage(there).free}


def _size(path: Path) -> int:
    """Bytes of all files below a folder; links are not followed, so nothing counts twice."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # it went away, or is not ours to see
    return total
