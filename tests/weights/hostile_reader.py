"""Opens paths under limits of CPU seconds and address space, and prints for each what was said and what it took, as JSON.

In: lines of [name, reader, path] on standard input. Run by test_hostile_files.py in a process of its own, so that a regression
ends this process and not the test run.
"""

import ctypes
import json
import resource
import sys
import time
from pathlib import Path


def peak() -> int:
    """Most memory that this process has had since `reset_peak`, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    # Everything is imported before the clock and the memory are looked at.
    import torch  # noqa: F401

    from qwenkit.hub.find import find_model
    from qwenkit.hub.verify import check_structure
    from qwenkit.text.tokenizer import Tokenizer
    from qwenkit.weights.adapter import read_adapter
    from qwenkit.weights.checkpoint import open_checkpoint
    from qwenkit.weights.gguf_file import read_gguf
    from qwenkit.weights.load import empty_and_stored
    from qwenkit.weights.safetensors_files import read_file
    from qwenkit.weights.torch_files import read_torch_files

    def model(path: Path) -> None:
        checkpoint = open_checkpoint(path)
        checkpoint.tokenizer()
        checkpoint.chat()
        _ = checkpoint.eos_token_ids
        empty_and_stored(checkpoint)

    def verify(path: Path) -> None:
        problems = check_structure(path, totals=True)
        if problems:
            raise ValueError("; ".join(map(str, problems)))

    readers = {
        "model": model,
        "verify": verify,
        "find": lambda path: find_model(str(path), download=False),
        "safetensors": read_file,
        "gguf": read_gguf,
        "torch": read_torch_files,
        "tokenizer": Tokenizer.from_folder,
        "adapter": lambda path: read_adapter(path, {}),
    }
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    libc = ctypes.CDLL(None)
    for name, reader, path in map(json.loads, sys.stdin):
        libc.malloc_trim(0)  # else one case could use what an earlier one gave back
        reset_peak()
        before, cpu = peak(), time.process_time()
        try:
            readers[reader](Path(path))  # type: ignore[no-untyped-call]
            said = None
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
        took = {"cpu": time.process_time() - cpu, "memory": peak() - before}
        print(json.dumps({"name": name, "said": said, **took}), flush=True)


if __name__ == "__main__":
    main()
