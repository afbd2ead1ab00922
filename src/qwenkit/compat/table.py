"""`TABLE`: every key of other trainers that is known, by the class that declares it; and the table in docs/train.md.

Run as a program, `python -m qwenkit.compat.table docs/train.md`, it writes the table between the marks in that file anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwenkit.compat.keys import Key, joined
from qwenkit.compat.llamafactory_keys import DATA, FINETUNE, METHOD, MODEL, REST
from qwenkit.compat.transformers_keys import TRAINING

SECTIONS = {
    "LLaMA-Factory: model, adapter, export, serving": MODEL,
    "LLaMA-Factory: data": DATA,
    "LLaMA-Factory: method": METHOD,
    "LLaMA-Factory: generation, evaluation, launch": REST,
    "transformers: TrainingArguments": TRAINING,
    "Qwen's finetune.py": FINETUNE,
}
TABLE: dict[str, Key] = joined(SECTIONS.values())

BEGIN, END = "<!-- table of keys: python -m qwenkit.compat.table -->", "<!-- end of the table of keys -->"


def canonical(key: str) -> str:
    """The name under which a key is known here, where only its name differs."""
    entry = TABLE.get(key)
    return key if entry is None or entry.name is None else entry.name


def markdown() -> str:
    """All keys, those with the same meaning in one row."""
    lines = ["| keys | | meaning here |", "|---|---|---|"]
    for title, keys in SECTIONS.items():
        lines.append(f"| **{title}** | | |")
        unchanged = [name for name, key in keys.items() if key.name == name]
        lines += [f"| {_code(unchanged)} | translated | the same |"] if unchanged else []
        rows: dict[tuple[str, str], list[str]] = {}
        for name, key in keys.items():
            if key.name != name:
                rows.setdefault((key.kind, f"`{key.name}`" if key.name else key.text), []).append(name)
        for kind in ("translated", "noted", "refused", "neutral"):
            lines += [f"| {_code(names)} | {kind} | {text} |" for (of, text), names in rows.items() if of == kind]
    return "\n".join(lines)


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def write_table(path: Path) -> None:
    """Put the table between the marks in a markdown file. ValueError where the marks are missing."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{begin}\n{markdown()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
