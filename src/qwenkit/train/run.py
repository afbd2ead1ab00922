"""A whole run: from a configuration to a folder. Everything between is other files' business; here is the order.

In: a TrainConfig. Out: in output_dir the trained model or adapter, checkpoints, trainer_log.jsonl, results and plots, and an
Outcome. What can be refused is refused before weights are loaded: settings, the folder, the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qwenkit import ops
from qwenkit.hub.find import find_model
from qwenkit.model.context import pack
from qwenkit.model.qwen import Qwen
from qwenkit.storage import write_json
from qwenkit.text.chat import ChatFormat
from qwenkit.text.chatml import NAMED
from qwenkit.text.tokenizer import Tokenizer
from qwenkit.train.config import TrainConfig
from qwenkit.train.data import DataStream, Report, check
from qwenkit.train.data.registry import find_sources
from qwenkit.train.log import (
    Callback,
    Everyone,
    JsonLines,
    Meter,
    ModelFlops,
    Progress,
    clock,
    count_parameters,
    peak_flops,
)
from qwenkit.train.loop import Trainer
from qwenkit.train.methods import (
    ADAPTERS,
    can_outline,
    compute_dtype,
    outline_model,
    prepare_model,
    save_trained,
    trainable_parameters,
)
from qwenkit.train.parallel import World, fill_slices, reshard, wrap
from qwenkit.train.parts import NextTokens, Objective, Outcome, Parts
from qwenkit.train.plots import plot_losses
from qwenkit.train.preference import STAGES, make_reference, objective
from qwenkit.train.recompute import recompute_blocks
from qwenkit.train.refusals import check_model, check_settings
from qwenkit.train.reporters import reporters
from qwenkit.train.resume import RESULTS, check_folders, prepare_folder, remove_earlier_run
from qwenkit.weights.checkpoint import Checkpoint, open_checkpoint
from qwenkit.weights.templated import with_template


def check_data(config: TrainConfig, *, processes: int = 1) -> Report:
    """Read all data as training would, and report; nothing is trained, and no weights are read.

    Raises what a run of `processes` processes would refuse before it reads data; what it would refuse then is in the report.
    """
    check_settings(config)
    check_folders(config, Path(config.output_dir))
    checkpoint = _checkpoint(config)
    check_model(config, checkpoint, processes)
    return check(config, checkpoint.tokenizer(), checkpoint.chat())


def train(config: TrainConfig, *, bar: bool = False, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Train as `config` says; in each of several processes, where torchrun started them.

    `bar` draws a progress line; `callbacks` hear of the run too. Raises ValueError or OSError, one sentence, for whatever the
    user can put right.
    """
    check_settings(config)
    ops.use()
    world = World.current(config)
    try:
        return _train(config, world, bar and world.is_first, callbacks)
    finally:
        world.close()


def _train(config: TrainConfig, world: World, bar: bool, callbacks: Sequence[Callback]) -> Outcome:
    begun = time.monotonic()
    progress = Progress(bar=bar)
    say: Callable[[str], None] = progress.say if world.is_first else lambda text: None
    folder = Path(config.output_dir)
    resumed = prepare_folder(config, folder, world, say)
    if world.is_first:
        find_model(config.model)  # one process downloads
    world.barrier()
    checkpoint = _checkpoint(config)
    check_model(config, checkpoint, world.world_size)
    tokenizer, chat = checkpoint.tokenizer(), checkpoint.chat()
    for source in find_sources((*config.dataset, *config.eval_dataset), Path(config.dataset_dir)):
        for note in source.notes:
            say(f"note: {note}")
    data = {
        split: DataStream(config, tokenizer, chat, rank=world.data_rank, world_size=world.data_world_size, split=split)
        for split in (("train", "eval") if config.has_eval else ("train",))
    }
    say(str(data["train"].report))
    sliced = world.shares and can_outline(checkpoint, config.method)
    if sliced:
        model, stored = outline_model(config, checkpoint, world.device)
    else:
        if world.shares:
            say(
                "each process reads the whole model and then keeps its share: "
                "packed matrices (GPTQ, AWQ, 4-bit GGUF) are read whole only"
            )
        model = prepare_model(config, checkpoint, world.device, progress=bar)
    dtype = compute_dtype(config, world.device)
    if dtype == torch.float16 and model.config.model_type.startswith("qwen"):
        say(
            "dtype is float16: activations of Qwen models exceed its largest number, 65504, and losses become nan; use bfloat16"
        )
    if model.config.moe is not None and checkpoint.config.get("output_router_logits") is True:
        say(
            "output_router_logits is true, but the balance loss of the router (router_aux_loss_coef) is not added to the loss"
        )
    goal = _objective(config, checkpoint, model, world)
    flops = ModelFlops.of(model)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    if config.torch_compile:
        for block in model.model.layers:
            block.compile()
    model = wrap(model, config, world)
    if sliced:
        fill_slices(model, stored, world.device, new_adapter=config.adapter is None, progress=bar)
    trained, every = count_parameters(model)
    say(
        f"{config.stage}, {config.method}: {trained:,} of {every:,} parameters are trained, "
        f"{str(dtype).removeprefix('torch.')} on {world.device.type}, {world.layout}"
    )
    parts = Parts(
        model=model,
        parameters=trainable_parameters(model),
        objective=goal,
        train=data["train"],
        evaluation=data.get("eval"),
        world=world,
        meter=Meter(flops, peak_flops(world.device, dtype), world.device, world.data_world_size),
    )
    if config.sample_prompts:
        parts.answers = lambda: answers(model, tokenizer, chat, checkpoint.eos_token_ids, config)
    if config.method in ADAPTERS:
        parts.beside = lambda there: save_trained(model, config, checkpoint, there, writes=world.is_first)
    listeners = [JsonLines(folder), progress, *reporters(config), *callbacks] if world.is_first else []
    torch.manual_seed(
        config.seed + world.data_rank
    )  # dropout: another one on each rank, the same within a tensor group
    trainer = Trainer(config, parts, Everyone(listeners))
    if resumed is not None:
        trainer.load(resumed)
        if trainer.progress.step < trainer.total_steps:
            say(f"goes on from {resumed}, step {trainer.progress.step} of {trainer.total_steps}")
        else:
            say(
                f"{resumed} is at step {trainer.progress.step}, and the run ends at step {trainer.total_steps}: nothing is left"
            )
    elif world.is_first and config.resume_from_checkpoint is None:
        remove_earlier_run(folder)
    outcome = trainer.run()
    if outcome.reason == "interrupted":
        say(
            f"stopped at step {outcome.step} of {trainer.total_steps}; resume_from_checkpoint=latest goes on from there"
        )
        return outcome
    if config.load_best_model_at_end and outcome.best_step is not None:
        trainer.load_weights(folder / f"checkpoint-{outcome.best_step}")
    save_trained(model, config, checkpoint, folder, writes=world.is_first)
    if trainer.average is not None:
        with trainer.averaged():
            save_trained(model, config, checkpoint, folder / "ema", writes=world.is_first)
    if world.is_first:
        _results(config, folder, outcome, trainer, time.monotonic() - begun)
        dropped = data["train"].report.num_dropped
        left_out = f"; {dropped} of {data['train'].report.num_records} records were dropped" if dropped else ""
        ended = "stopped early" if outcome.reason == "early" else "done"
        say(f"{ended}: {folder}, {clock(time.monotonic() - begun)}{left_out}")
    return outcome


def _checkpoint(config: TrainConfig) -> Checkpoint:
    checkpoint = open_checkpoint(find_model(config.model))
    if config.stage == "pt":
        return checkpoint
    if config.template == "default" and config.labels == "chat" and checkpoint.chat() is None:
        raise ValueError(
            f"template is missing: the model has none; allowed are {', '.join(sorted(NAMED, reverse=True))} and .jinja files"
        )
    return with_template(checkpoint, config.template)


def _objective(config: TrainConfig, checkpoint: Checkpoint, model: Qwen, world: World) -> Objective:
    if config.stage not in STAGES:
        return NextTokens(config.loss_chunk)
    other = open_checkpoint(find_model(config.ref_model)) if config.ref_model is not None else None
    return objective(config, make_reference(config, checkpoint, world, model, ref_checkpoint=other))


@torch.no_grad()
def answers(
    model: Qwen, tokenizer: Tokenizer, chat: ChatFormat | None, eos: Sequence[int], config: TrainConfig
) -> list[tuple[str, str]]:
    """What the model answers to `sample_prompts` now: the likeliest token each time, all prompts side by side, no cache."""
    prompts = [
        list(chat.render([{"role": "user", "content": prompt}]).ids)
        if chat is not None
        else tokenizer.encode_document(prompt)
        for prompt in config.sample_prompts
    ]
    texts = [list(prompt) for prompt in prompts]
    going = list(range(len(texts)))
    device = next(model.parameters()).device
    model.eval()
    for _ in range(config.sample_max_new_tokens):
        ids, positions, context = pack([texts[i] for i in going], model.config, device)
        ends = torch.tensor(context.lengths, device=device).cumsum(0) - 1
        tokens = model.logits(model(ids, positions, context)[ends]).argmax(-1).tolist()
        for i, token in zip(going, tokens, strict=True):
            texts[i].append(token)
        going = [i for i in going if texts[i][-1] not in eos]
        if not going:
            break
    model.train()
    reshard(model)
    new = [[t for t in text[len(prompt) :] if t not in eos] for text, prompt in zip(texts, prompts, strict=True)]
    return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(config.sample_prompts, new, strict=True)]


def _results(config: TrainConfig, folder: Path, outcome: Outcome, trainer: Trainer, seconds: float) -> None:
    results = {
        "train_loss": outcome.loss,
        "eval_loss": outcome.eval_loss,
        "best_eval_loss": trainer.progress.best,
        "best_step": outcome.best_step,
        "steps": outcome.step,
        "stopped_early": outcome.reason == "early",
        "seconds": round(seconds, 2),
    }
    # A loss that is not finite is written as null: it was measured. What was not measured is left out.
    write_json(folder / RESULTS, {name: value for name, value in results.items() if value is not None})
    if config.plot_loss:
        plot_losses(folder)
