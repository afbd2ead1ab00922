"""Tokens a second and peak memory of a LoRA run on the CPU, against transformers + PEFT + TRL (SFTTrainer with packing).

Each side runs in a process of its own, turn about, from the same folder in float32, on the same samples: they are rendered and
tokenized here once, and the peer is given ids and labels. Both fill packs of --pack tokens, one pack a step, with the same rank
on all Linears, AdamW, clipping and schedule, without recomputation. The clock runs from the first step to the end of the last.
A token counts when a step has seen it; padding does not count. Where other programs want the cores too, tokens for each second
of processor time say more than tokens a second.

    python benchmarks/train_throughput.py --peer-python peer/bin/python            smollm2, alpaca_zh, 200 steps
    python benchmarks/train_throughput.py --peer-python peer/bin/python --steps 20 --rounds 3 --least 1.3

The peer's environment needs torch, transformers, peft and trl. Prints a table, or with --json one object; exit code 1 where the
ratio of tokens a second is below --least or qwenkit's peak memory is not the smaller one.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RANK = 8
LEARNING_RATE = 1e-4


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """What both sides agree on, as a TrainConfig's fields."""
    return {
        "model": given["model"],
        "dataset": [given["data"]],
        "cutoff_len": given["pack"],
        "overlong": "truncate",
        "cache_dir": given["folder"],
        "output_dir": given["folder"],
    }


def ours(given: dict[str, Any]) -> dict[str, Any]:
    """Our side: the whole of `qwenkit train`."""
    import torch

    torch.set_num_threads(given["threads"])
    from qwenkit.train.config import TrainConfig
    from qwenkit.train.log import Record, Silent
    from qwenkit.train.run import train

    class Clock(Silent):
        begun = ended = (0.0, 0.0)
        tokens = 0.0

        def start(self, config: TrainConfig, step: int, total_steps: int) -> None:
            self.begun = time.perf_counter(), time.process_time()

        def log(self, step: int, record: Record) -> None:
            self.tokens = record["total_tokens"]

        def finish(self) -> None:
            self.ended = time.perf_counter(), time.process_time()

    clock = Clock()
    chosen = settings(given) | {
        "packing": True,
        "max_steps": given["steps"],
        "lora_rank": RANK,
        "learning_rate": LEARNING_RATE,
        "save_steps": None,
    }
    outcome = train(TrainConfig.from_settings(chosen), callbacks=[clock])
    return {
        "tokens": int(clock.tokens),
        "seconds": clock.ended[0] - clock.begun[0],
        "cpu_seconds": clock.ended[1] - clock.begun[1],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": outcome.loss,
    }


def write_samples(given: dict[str, Any], path: Path) -> None:
    """Every sample as a line {"ids", "labels"}, as our side trains it."""
    from qwenkit.train.config import TrainConfig
    from qwenkit.train.data import DataStream
    from qwenkit.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(given["model"]))
    config = TrainConfig.from_settings(settings(given) | {"packing": False, "shuffle": False})
    stream = DataStream(config, checkpoint.tokenizer(), checkpoint.chat())
    with path.open("w", encoding="utf-8") as lines:
        for batch in stream:
            lines.write(json.dumps({"ids": batch.ids.tolist(), "labels": batch.labels.tolist()}) + "\n")


def run_side(command: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """One side in a process of its own; its last line is its result."""
    environment = os.environ | {"OMP_NUM_THREADS": str(given["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, json.dumps(given)], stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    result["tok_s"] = result["tokens"] / result["seconds"]
    result["tok_cpu_s"] = result["tokens"] / result["cpu_seconds"]
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number over the rounds."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def main() -> int:
    if sys.argv[1:2] == ["ours"]:
        print(json.dumps(ours(json.loads(sys.argv[2]))))
        return 0
    data = Path(__file__).resolve().parents[1] / "tests" / "data" / "sft" / "alpaca_zh_demo.json.xz"
    parser = argparse.ArgumentParser(description="LoRA training on the CPU against transformers + PEFT + TRL.")
    parser.add_argument("--peer-python", required=True, help="python of an environment with torch, peft and trl")
    parser.add_argument("--model", default="smollm2", help="whatever qwenkit can export in float32")
    parser.add_argument("--data", type=Path, default=data, help="a file of samples (alpaca, messages, …), .xz or not")
    parser.add_argument("--pack", type=int, default=1024, help="tokens of a pack, which is a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-packing", default="bfd", choices=("bfd", "bfd_split", "wrapped"))
    parser.add_argument(
        "--least", type=float, default=0.0, help="ratio of tokens a second below which the exit code is 1"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    if not flags.data.is_file():
        parser.error(f"--data is {flags.data}, which is no file")

    with tempfile.TemporaryDirectory(prefix="qwenkit-") as name:
        folder = Path(name)
        samples = flags.data.resolve()
        if samples.suffix == ".xz":
            samples = folder / samples.stem
            samples.write_bytes(lzma.decompress(flags.data.read_bytes()))
        exported = folder / "model"
        command = [sys.executable, "-m", "qwenkit", "export", "--model", flags.model, "--output", str(exported)]
        subprocess.run([*command, "--dtype", "float32"], check=True, stdout=sys.stderr)
        given: dict[str, Any] = {
            "model": str(exported),
            "data": str(samples),
            "pack": flags.pack,
            "steps": flags.steps,
            "threads": flags.threads,
            "rank": RANK,
            "learning_rate": LEARNING_RATE,
            "packing": flags.peer_packing,
            "samples": str(folder / "samples.jsonl"),
        }
        write_samples(given | {"folder": str(folder / "cache")}, Path(given["samples"]))
        sides: dict[str, list[dict[str, Any]]] = {"qwenkit": [], "peer": []}
        commands = {
            "qwenkit": [sys.executable, __file__, "ours"],
            "peer": [flags.peer_python, str(Path(__file__).with_name("train_peer.py"))],
        }
        for number in range(flags.rounds):
            for side, runs in sides.items():
                runs.append(run_side(commands[side], given | {"folder": str(folder / f"{side}-{number}")}))
                print(
                    f"round {number + 1}, {side}: {runs[-1]['tokens']} tokens, {runs[-1]['tok_s']:.1f} tok/s, "
                    f"{runs[-1]['tok_cpu_s']:.1f} tok/cpu-s, peak {runs[-1]['peak_bytes'] / 2**20:.0f} MiB, "
                    f"loss {runs[-1]['loss']:.3f}",
                    file=sys.stderr,
                )
    found = {side: summary(runs) for side, runs in sides.items()}
    us, them = found["qwenkit"], found["peer"]
    record = found | {
        "ratio": round(median(a["tok_s"] / b["tok_s"] for a, b in zip(*sides.values(), strict=True)), 3),
        "cpu_ratio": round(median(a["tok_cpu_s"] / b["tok_cpu_s"] for a, b in zip(*sides.values(), strict=True)), 3),
        "memory_ratio": round(us["peak_bytes"] / them["peak_bytes"], 3),
        "load": os.getloadavg()[0],
    }
    if flags.json:
        print(json.dumps(record))
    else:
        for side, numbers in found.items():
            print(
                f"{side:8} {numbers['tok_s']:8.1f} tok/s {numbers['tok_cpu_s']:8.1f} tok/cpu-s "
                f"{numbers['peak_bytes'] / 2**20:8.0f} MiB"
            )
        print(f"ratio {record['ratio']} (processor time {record['cpu_ratio']}), memory {record['memory_ratio']}")
    return int(record["ratio"] < flags.least or us["peak_bytes"] >= them["peak_bytes"])


if __name__ == "__main__":
    sys.exit(main())
