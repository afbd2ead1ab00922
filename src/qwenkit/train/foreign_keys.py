"""What other trainers' keys are called here, which have no effect and why, which are refused, and their defaults.

From LLaMA-Factory (v0.8.3 and later) and from QwenLM/Qwen's finetune.py with transformers' TrainingArguments. Data only; what is
done with it is train/foreign.py's business.
"""

from __future__ import annotations

from typing import Any

RENAMED = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter",
    "additional_target": "modules_to_save",
    "freeze_trainable_modules": "freeze_trainable",
    "interleave_probs": "mix_weights",
    "default_system": "system",
    "dpo_beta": "pref_beta",
    "kto_beta": "pref_beta",
    "orpo_beta": "pref_beta",
    "dpo_loss": "pref_loss",
    "dpo_ftx": "pref_ftx",
    "dpo_label_smoothing": "pref_label_smoothing",
    "data_path": "dataset",
    "eval_data_path": "eval_dataset",
    "model_max_length": "cutoff_len",
    "lora_r": "lora_rank",
}

_OURS = "qwenkit does this its own way"
_LIBRARY = "it chooses among kernels of a library that is not used"
_LOADER = "the data is read by qwenkit's own loader"
_HUB = "the model is found as `qwenkit pull` finds it"

WITHOUT_EFFECT = {
    "do_eval": "val_size or eval_dataset say whether there is an evaluation",
    "do_predict": "`qwenkit generate` answers a file of prompts",
    "predict_with_generate": "sample_prompts are answered at each evaluation",
    "lazy_preprocess": "tokenized data is cached, and read from the cache as it is needed",
    "flash_attn": _LIBRARY,
    "use_unsloth": _LIBRARY,
    "use_unsloth_gc": _LIBRARY,
    "enable_liger_kernel": _LIBRARY,
    "upcast_layernorm": "norms are always computed in float32",
    "upcast_lmhead_output": "the loss is always computed in float32",
    "trust_remote_code": "no code of a model folder is ever run",
    "use_fast_tokenizer": _OURS,
    "split_special_tokens": _OURS,
    "low_cpu_mem_usage": "the model is always read tensor by tensor",
    "tokenized_path": "tokenized data is cached by its content, see cache_dir",
    "cache_dir": _HUB,
    "model_revision": _HUB,
    "hf_hub_token": _HUB,
    "ms_hub_token": _HUB,
    "preprocessing_batch_size": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_drop_last": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "group_by_length": "nothing is padded, so there is nothing to group",
    "remove_unused_columns": _LOADER,
    "ignore_pad_token_for_loss": "there are no pad tokens",
    "compute_accuracy": "the loss is what is measured",
    "include_num_input_tokens_seen": "tokens are always counted",
    "include_tokens_per_second": "tokens a second are always shown",
    "logging_first_step": "the first step is always logged",
    "logging_dir": "logs are written to output_dir",
    "logging_strategy": "logging_steps says when",
    "log_level": _OURS,
    "disable_tqdm": _OURS,
    "save_only_model": "a checkpoint always holds what resuming needs",
    "save_safetensors": "safetensors is the only format",
    "metric_for_best_model": "the best checkpoint is that of the lowest eval_loss",
    "greater_is_better": "the best checkpoint is that of the lowest eval_loss",
    "eval_accumulation_steps": "the evaluation keeps no logits",
    "ddp_find_unused_parameters": "a parameter without a gradient counts as zero",
    "ddp_backend": "nccl on GPUs, gloo on CPUs",
    "fsdp_config": "each block is one unit of fsdp",
    "local_rank": "torchrun's environment says it",
    "gradient_checkpointing_kwargs": _OURS,
    "max_grad_norm_type": _OURS,
    "tf32": _OURS,
    "full_determinism": _OURS,
    "data_seed": "seed is the seed of the data too",
    "create_new_adapter": "an adapter given by adapter_name_or_path is gone on with",
    "quantization_method": "4-bit weights are NF4",
    "quantization_type": "4-bit weights are NF4",
    "lora_weight_path": "finetune.py never reads it either",
    "use_cache": "training keeps no keys and values",
    "print_param_status": _OURS,
}

REFUSED = {
    "pissa_init": "PiSSA is not supported; allowed is LoRA's own initialisation",
    "loraplus_lr_ratio": "LoRA+ is not supported; allowed is one learning rate",
    "use_galore": "GaLore is not supported; allowed is optim adamw or adamw_8bit",
    "use_apollo": "APOLLO is not supported; allowed is optim adamw or adamw_8bit",
    "use_badam": "BAdam is not supported; allowed is optim adamw or adamw_8bit",
    "use_adam_mini": "Adam-mini is not supported; allowed is optim adamw or adamw_8bit",
    "use_llama_pro": "LLaMA-Pro is not supported; allowed is finetuning_type freeze",
    "use_muon": "Muon is not supported; allowed is optim adamw or adamw_8bit",
    "freeze_extra_modules": "it is not supported; freeze_trainable takes patterns of any parameter's name",
    "freeze_vision_tower": "these are models of text only",
    "shift_attn": "shifted attention is not supported",
    "mixture_of_depths": "mixture of depths is not supported",
    "resize_vocab": "the vocabulary stays as it is",
    "rope_scaling": "the context is what the model's config.json says; change it there",
    "train_from_scratch": "a model folder is needed; a new one can be made with random weights",
    "ref_model_adapters": "allowed is ref_model, a whole model",
    "ref_model_quantization_bit": "allowed is ref_model, a whole model",
    "reward_model": "it belongs to ppo, which is not supported",
    "push_to_hub": "nothing is uploaded; allowed is output_dir",
    "export_dir": "it belongs to `qwenkit export`",
    "neftune_noise_alpha": "NEFTune is not supported",
    "label_smoothing_factor": "label smoothing is not supported",
    "auto_find_batch_size": "oom_policy halve does that, with the same number of samples in a step",
    "torch_empty_cache_steps": "it is not supported",
}

OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
}

# LLaMA-Factory's templates, and what a model without one gets for them; a model that has one keeps it.
TEMPLATES = {
    "default": "default",
    "qwen": "qwen",
    "qwen2": "qwen",
    "qwen3": "chatml",
    "qwen3_nothink": "chatml",
    "chatml": "chatml",
}

QWEN1_TARGETS = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"),  # both of a block's output projections have this name
    "w1": ("up_proj",),
    "w2": ("gate_proj",),
}

# What holds where a file says nothing, as far as it is not what TrainConfig does.
LLAMAFACTORY_DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "cutoff_len": 1024,
    "overlong": "truncate",
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "logging_steps": 500,
    "gradient_checkpointing": True,
}
FINETUNE_DEFAULTS: dict[str, Any] = {
    "method": "full",
    "model": "Qwen/Qwen-7B",
    "labels": "qwen1",
    "system": "You are a helpful assistant.",
    "cutoff_len": 8192,
    "overlong": "truncate",
    "dataset_dir": ".",
    "lora_rank": 64,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "lora_target": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj", "gate_proj"],
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "logging_steps": 500,
}
