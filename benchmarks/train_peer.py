"""The other side of train_throughput.py: a LoRA run of transformers + PEFT + TRL, in an environment of its own.

In: one JSON object as argument (model folder, a file of samples as {"ids", "labels"} lines, length of a pack, steps, rank,
threads, packing strategy). Out: one JSON object on the last line of stdout. Imports nothing of qwenkit.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def main() -> None:
    given = json.loads(sys.argv[1])

    import torch

    torch.set_num_threads(given["threads"])
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        begun = (0.0, 0.0)
        ended = (0.0, 0.0)

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = time.perf_counter(), time.process_time()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended = time.perf_counter(), time.process_time()

    class Counting(SFTTrainer):  # type: ignore[misc]
        tokens = targets = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            self.targets += int((inputs["labels"][:, 1:] != -100).sum())
            return super().training_step(model, inputs, *args, **kwargs)

    with open(given["samples"], encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    clock = Clock()
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(
            given["model"], dtype=torch.float32, attn_implementation="sdpa", use_cache=False
        ),
        args=SFTConfig(
            output_dir=given["folder"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            packing=True,
            packing_strategy=given["packing"],
            max_length=given["pack"],
            shuffle_dataset=True,
            max_steps=given["steps"],
            per_device_train_batch_size=1,
            optim="adamw_torch_fused",
            learning_rate=given["learning_rate"],
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [s["ids"] for s in samples], "labels": [s["labels"] for s in samples]}
        ),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        peft_config=LoraConfig(
            r=given["rank"], lora_alpha=2 * given["rank"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print(
        json.dumps(
            {
                "tokens": trainer.tokens,
                "targets": trainer.targets,
                "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                "seconds": clock.ended[0] - clock.begun[0],
                "cpu_seconds": clock.ended[1] - clock.begun[1],
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "loss": losses[-1] if losses else trainer.state.log_history[-1].get("train_loss"),
            }
        )
    )


if __name__ == "__main__":
    main()
