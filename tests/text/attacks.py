"""Runs hostile templates and tokenizer files, in a process of its own with limits, for test_attacks.py.

On stdin: cases as JSON lines. On stdout, for each: its id, what was raised, and the CPU seconds. Last: MiB by which memory grew.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qwenkit.text import template_budget
from qwenkit.text.template import ChatTemplate, compile_template, render_template
from qwenkit.text.tokenizer import Tokenizer

MEMORY = 700 << 20  # bytes of address space beyond what the imports took
CPU_SECONDS = 100  # for all cases
HELLO = {"role": "user", "content": "hello " * 20_000}


def byte_characters() -> list[str]:
    """GPT-2's stand-ins for the bytes: a vocabulary without merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def run(case: dict[str, Any], trial: bool) -> str:
    """What the case's file or template does."""
    if case["kind"] == "tokenizer":
        vocab = {character: id for id, character in enumerate(byte_characters())}
        data = {"model": {"type": "BPE", "vocab": vocab, "merges": []}}
        data |= {name: case[name] for name in ("normalizer", "pre_tokenizer")}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.json").write_text(json.dumps(data))
            tokenizer = Tokenizer.from_folder(Path(folder))
        for text in ("a" * 40 + "b", "m", "1" * 40, "words and words " * 10):
            tokenizer.encode(text)
        return "nothing"
    source = case.get("template") or "".join(text * count for text, count in case["parts"])
    if trial:
        return ChatTemplate(source).render({"messages": [HELLO]})
    return render_template(compile_template(source), {"messages": [HELLO]})


def main() -> None:
    trial = sys.argv[1] == "trial"
    if not trial:
        template_budget.SECONDS = 0.15
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        case = json.loads(line)
        started = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            raised = f"returned {run(case, trial)[:40]!r}"
        except BaseException as error:
            raised = f"{type(error).__name__}: {error}"
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = time.process_time() - started[0]
        seconds += children.ru_utime - started[1].ru_utime + children.ru_stime - started[1].ru_stime
        print(json.dumps([case["id"], raised, seconds]), flush=True)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, children.ru_maxrss >> 10)


if __name__ == "__main__":
    main()
