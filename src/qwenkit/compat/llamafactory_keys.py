"""Keys of LLaMA-Factory's argument classes (v0.8.3 to v0.9.5) and of Qwen's finetune.py, beside transformers' own. Data only."""

from __future__ import annotations

from qwenkit.compat.keys import joined, neutral, noted, refused, renamed, same, translated

_HUB = "the model is found as `qwenkit pull` finds it"
_KERNELS = "it chooses among kernels of a library that is not used"
_TEXT_ONLY = "these are models of text only"
_SERVING = "it belongs to chat and serve"
_VOCABULARY = "the vocabulary stays as it is; allowed are the tokens that the model has"
_ADAMW = "allowed is optim adamw or adamw_8bit"
_WHOLE_MODEL = "allowed is ref_model, a whole model"
_EVAL = "it belongs to LLaMA-Factory's eval; `qwenkit eval` measures a model"
_PPO = "it belongs to ppo, which is refused"

MODEL = joined(
    (
        renamed(model_name_or_path="model"),
        translated("adapter_name_or_path", "adapter, one folder"),
        translated("quantization_bit", "method qlora for 4"),
        translated("disable_gradient_checkpointing", "gradient_checkpointing"),
        translated("split_special_tokens", "split_special_tokens, in stage pt"),
        same("double_quantization"),
        noted(_HUB, "cache_dir hf_hub_token ms_hub_token om_hub_token", model_revision="main"),
        noted("an adapter is one folder", "adapter_folder"),
        noted("qwenkit has one tokenizer", use_fast_tokenizer=True),
        noted("the model is always read tensor by tensor", low_cpu_mem_usage=True),
        noted("no code of a model folder is ever run", "trust_remote_code"),
        noted(_KERNELS, "use_unsloth use_unsloth_gc enable_liger_kernel use_v1_kernels", flash_attn="auto"),
        noted("activations are computed again block by block", use_reentrant_gc=True),
        noted("norms are always computed in float32", "upcast_layernorm"),
        noted("the loss is always computed in float32", "upcast_lmhead_output"),
        noted("training keeps no keys and values", use_cache=True, use_kv_cache=True),
        noted("weights stay on the device", "quantization_device_map", offload_folder="offload"),
        noted("the parameters that are trained are counted in the log", "print_param_status"),
        noted("4-bit weights are NF4, or the model's own", quantization_method="bitsandbytes"),
        refused("4-bit weights are NF4, or the model's own", quantization_type="nf4"),
        noted("experts are computed where the model is", "use_kt kt_weight_path kt_expert_checkpoint_path"),
        neutral(
            "kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size kt_optimize_rule cpu_infer "
            "chunk_size kt_maxlen kt_use_cuda_graph kt_mode kt_force_think",
            "only with use_kt",
        ),
        neutral("infer_backend infer_dtype", _SERVING),
        neutral("vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config", _SERVING),
        neutral("sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend", _SERVING),
        refused(_VOCABULARY, "resize_vocab add_tokens add_special_tokens new_special_tokens new_special_tokens_config"),
        neutral("init_special_tokens", "only with new special tokens, which are refused"),
        refused("the context is what the model's config.json says; change it there", "rope_scaling"),
        refused("shifted attention is not supported", "shift_attn"),
        refused("mixture of depths is not supported", "mixture_of_depths"),
        refused("the router's loss is not added; allowed is 0", "moe_aux_loss_coef"),
        refused("a model folder is needed; a new one can be made with random weights", "train_from_scratch"),
        noted(_TEXT_ONLY, "visual_inputs"),
        neutral(
            "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels "
            "video_fps video_maxlen use_audio_in_video audio_sampling_rate image_resolution video_resolution",
            _TEXT_ONLY,
        ),
        noted("`qwenkit export` writes a merged model", "export_dir"),
        neutral(
            "export_size export_device export_quantization_bit export_quantization_dataset export_quantization_nsamples "
            "export_quantization_maxlen export_legacy_format export_hub_model_id",
            "it belongs to export",
        ),
    )
)

DATA = joined(
    (
        same("dataset eval_dataset dataset_dir cutoff_len train_on_prompt mask_history streaming buffer_size"),
        same("mix_strategy overwrite_cache preprocessing_num_workers max_samples val_size packing enable_thinking"),
        renamed(interleave_probs="mix_weights", default_system="system"),
        translated("template", "template, where the model has none of its own"),
        translated("neat_packing", "packing"),
        neutral("media_dir", _TEXT_ONLY),
        noted("the data is read by qwenkit's own loader", preprocessing_batch_size=1000),
        noted("tokenized data is cached by its content, see cache_dir", "tokenized_path data_shared_file_system"),
        noted("there are no pad tokens", ignore_pad_token_for_loss=True),
        noted("the loss over all of eval_dataset is measured", "eval_on_each_dataset"),
        noted("answers are not searched by beams", "eval_num_beams", num_beams=1),
        noted("tools and calls are written by the model's chat template", "tool_format"),
        refused("earlier thoughts are kept or dropped as the chat template does", "preserve_thinking"),
    )
)

METHOD = joined(
    (
        same("lora_alpha lora_dropout lora_rank lora_target use_rslora use_dora pref_beta pref_ftx kto_chosen_weight"),
        same("kto_rejected_weight simpo_gamma ref_model freeze_trainable_layers freeze_trainable_modules"),
        same("freeze_extra_modules plot_loss"),
        renamed(additional_target="modules_to_save", dpo_label_smoothing="pref_label_smoothing"),
        renamed(dpo_beta="pref_beta", kto_beta="pref_beta", orpo_beta="pref_beta", dpo_ftx="pref_ftx"),
        renamed(dpo_loss="pref_loss", kto_ftx="pref_ftx", early_stopping_steps="early_stopping_patience"),
        renamed(num_layer_trainable="freeze_trainable_layers", name_module_trainable="freeze_trainable_modules"),
        translated("stage", "stage"),
        translated("finetuning_type", "method"),
        translated("pref_loss", "pref_loss; stage for orpo"),
        translated("pure_bf16", "dtype and master_weights"),
        translated("disable_shuffling", "shuffle"),
        translated("use_swanlab", "report_to"),
        renamed(swanlab_run_name="run_name"),
        noted("swanlab's own configuration says it", "swanlab_workspace swanlab_api_key swanlab_logdir"),
        noted("swanlab's own configuration says it", swanlab_project="llamafactory", swanlab_mode="cloud"),
        noted("swanlab's own configuration says it", "swanlab_lark_webhook_url swanlab_lark_secret"),
        noted("the loss is what is measured", "compute_accuracy"),
        noted("tokens a second are always shown", "include_effective_tokens_per_second"),
        noted(_TEXT_ONLY, "train_mm_proj_only", freeze_vision_tower=True, freeze_multi_modal_projector=True),
        noted("processes are laid out by qwenkit itself", "use_mca use_hyper_parallel hyper_parallel_args"),
        refused(
            "a new adapter is made where no adapter is given; merge the given one by `qwenkit export` first",
            "create_new_adapter",
        ),
        refused("PiSSA is not supported; allowed is LoRA's own initialisation", "pissa_init"),
        neutral("pissa_iter pissa_convert", "only with pissa_init, which is refused"),
        refused("LoRA+ is not supported; allowed is one learning rate", "loraplus_lr_ratio"),
        neutral("loraplus_lr_embedding", "only with loraplus_lr_ratio, which is refused"),
        neutral("module_dropout oft_rank oft_block_size oft_target", "only with finetuning_type oft, which is refused"),
        refused("the language model is what is trained", "freeze_language_model"),
        refused("BCO is not supported; allowed is 0", "pref_bco_weight"),
        refused("length-desensitized DPO is not supported", "ld_alpha"),
        refused(_WHOLE_MODEL, "ref_model_adapters ref_model_quantization_bit"),
        neutral("ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards", _PPO),
        neutral("reward_model reward_model_adapters reward_model_quantization_bit reward_model_type", _PPO),
        refused(f"GaLore is not supported; {_ADAMW}", "use_galore"),
        neutral(
            "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise",
            "only with use_galore, which is refused",
        ),
        refused(f"APOLLO is not supported; {_ADAMW}", "use_apollo"),
        neutral(
            "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front",
            "only with use_apollo, which is refused",
        ),
        refused(f"BAdam is not supported; {_ADAMW}", "use_badam"),
        neutral(
            "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
            "badam_mask_mode badam_verbose",
            "only with use_badam, which is refused",
        ),
        refused(f"Adam-mini is not supported; {_ADAMW}", "use_adam_mini"),
        refused(f"Muon is not supported; {_ADAMW}", "use_muon"),
        refused("LLaMA-Pro is not supported; allowed is finetuning_type freeze", "use_llama_pro"),
        refused("this loss is not supported; allowed is cross-entropy", "use_dft_loss use_asft_loss use_eaft_loss"),
        neutral("asft_alpha eaft_alpha", "only with a loss that is refused"),
    )
)

REST = joined(
    (
        neutral(
            "do_sample temperature top_p top_k max_length max_new_tokens repetition_penalty length_penalty "
            "skip_special_tokens",
            "it belongs to chat and generate",
        ),
        neutral(
            "ray_num_workers ray_init_kwargs ray_run_name ray_storage_path ray_storage_filesystem "
            "resources_per_worker placement_strategy",
            "only with Ray, which does not start training",
        ),
        noted("--master and --port, or torchrun, say where processes meet", "master_addr master_port"),
        noted("qwenkit bench train measures a step", "enable_torch_profiler"),
        neutral(
            "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
            "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
            "only with enable_torch_profiler",
        ),
        noted("matrices are multiplied in dtype", "fp8"),
        neutral("fp8_backend fp8_enable_fsdp_float8_all_gather", "only with fp8"),
        refused(_EVAL, "task", task_dir="evaluation", batch_size=4, lang="en", n_shot=5, save_dir=None),
        refused(_EVAL, download_mode="reuse_dataset_if_exists"),
    )
)

FINETUNE = joined(
    (
        renamed(data_path="dataset", eval_data_path="eval_dataset", model_max_length="cutoff_len", lora_r="lora_rank"),
        same("lora_bias"),
        translated("use_lora q_lora", "method"),
        translated("lora_target_modules", "lora_target"),
        noted("tokenized data is cached, and read from the cache as it is needed", "lazy_preprocess"),
        noted("finetune.py never reads it either", "lora_weight_path"),
    )
)
