"""Keys of transformers' TrainingArguments and Seq2SeqTrainingArguments (versions 4.32 to 5.24). Data only."""

from __future__ import annotations

from qwenkit.compat.keys import joined, neutral, noted, refused, renamed, same, translated

_LOADER = "the data is read by qwenkit's own loader"
_LOG = "qwenkit's own log says it"
_UPLOAD = "nothing is uploaded; `hf upload` sends output_dir"
_LOSS = "the best checkpoint is that of the lowest eval_loss"
_PRECISION = "dtype says how is computed"
_COMPILE = "torch_compile says whether the blocks are compiled"
_WRAPPING = "each block is one unit of fsdp"
_METRICS = "the evaluation measures the loss only"
_TRACKIO = "trackio's own configuration says it"

TRAINING = joined(
    (
        same("output_dir overwrite_output_dir per_device_train_batch_size per_device_eval_batch_size"),
        same("gradient_accumulation_steps learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"),
        same("num_train_epochs warmup_ratio warmup_steps logging_steps save_steps eval_steps seed ddp_timeout"),
        same("load_best_model_at_end gradient_checkpointing torch_compile run_name"),
        renamed(per_gpu_train_batch_size="per_device_train_batch_size", evaluation_strategy="eval_strategy"),
        renamed(
            per_gpu_eval_batch_size="per_device_eval_batch_size", activation_checkpointing="gradient_checkpointing"
        ),
        translated("do_train do_eval do_predict", "which verb the file is for; a file that does not train is refused"),
        translated("max_steps", "max_steps, none below 1"),
        translated("lr_scheduler_type lr_scheduler_kwargs", "lr_scheduler_type, min_lr_ratio, decay_ratio"),
        translated("eval_strategy", "eval_strategy"),
        translated("save_strategy", "save_strategy"),
        translated("save_total_limit", "save_total_limit, none below 1"),
        translated("resume_from_checkpoint", "resume_from_checkpoint, latest for true"),
        translated("bf16 fp16", "dtype"),
        translated("use_cpu no_cuda", "device"),
        translated("optim", "optim, by the algorithm that it names"),
        translated("report_to", "report_to, none and all among them"),
        translated("train_sampling_strategy", "shuffle"),
        translated("fsdp", "parallel fsdp"),
        translated("deepspeed", "parallel and the numbers of the file"),
        noted("sample_prompts are answered at each evaluation", "predict_with_generate"),
        noted("the first step is always logged", "logging_first_step"),
        noted("logs are written to output_dir", "logging_dir"),
        noted("logging_steps says when", logging_strategy="steps"),
        noted("device says where is computed", "use_mps_device"),
        noted(_LOG, log_level="passive", log_level_replica="warning", log_on_each_node=True, disable_tqdm=False),
        noted("a loss that is not finite is never hidden, see nan_policy", logging_nan_inf_filter=True),
        noted("evaluation begins at its first step", "eval_delay eval_on_start"),
        noted("the evaluation keeps no logits", "eval_accumulation_steps", eval_do_concat_batches=True),
        noted(_METRICS, "prediction_loss_only include_inputs_for_metrics include_for_metrics batch_eval_metrics"),
        noted(_METRICS, "eval_use_gather_object use_legacy_prediction_loop label_names"),
        noted(_LOSS, "greater_is_better", metric_for_best_model="loss"),
        noted(
            "a checkpoint always holds what resuming needs", "save_only_model restore_callback_states_from_checkpoint"
        ),
        noted("safetensors is the only format", save_safetensors=True),
        noted("output_dir is one folder that all nodes see", "save_on_each_node"),
        noted("SIGTERM always saves a checkpoint", "enable_jit_checkpoint"),
        noted("a run goes on where its checkpoint is in the data", "ignore_data_skip"),
        noted("seed is the seed of the data too", "data_seed"),
        noted("one device computes the same again", "full_determinism"),
        noted(_LOADER, "dataloader_drop_last dataloader_num_workers dataloader_prefetch_factor"),
        noted(
            _LOADER, "dataloader_persistent_workers dataloader_multiprocessing_context dispatch_batches split_batches"
        ),
        noted(_LOADER, dataloader_pin_memory=True, remove_unused_columns=True, dataloader_in_order=True),
        noted("nothing is padded, so there is nothing to group", "group_by_length sortish_sampler"),
        neutral("length_column_name", "only with group_by_length"),
        noted("tokens are always counted", "include_num_input_tokens_seen"),
        noted("tokens a second are always shown", "include_tokens_per_second"),
        noted("oom_policy halve does that, with the same number of samples in a step", "auto_find_batch_size"),
        noted("memory is given back when it runs out", "torch_empty_cache_steps"),
        noted("a step's loss is the mean over the targets of all processes", average_tokens_across_devices=True),
        noted(_PRECISION, "bf16_full_eval fp16_full_eval tf32 fp16_backend half_precision_backend"),
        noted(_PRECISION, fp16_opt_level="O1"),
        noted(_COMPILE, "torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval use_ipex"),
        noted("it chooses among kernels of a library that is not used", "use_liger_kernel liger_kernel_config"),
        noted("activations are computed again block by block", "gradient_checkpointing_kwargs"),
        noted("activations are computed again block by block", "activation_checkpointing_kwargs"),
        noted("a parameter without a gradient counts as zero", "ddp_find_unused_parameters"),
        noted("nccl on GPUs, gloo on CPUs", "ddp_backend xpu_backend"),
        noted("gradients are reduced by qwenkit itself", "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"),
        noted(_WRAPPING, "fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"),
        noted("parallel, dp_shard, tensor_parallel and context_parallel say it", "parallelism_config mp_parameters"),
        noted("parallel, dp_shard, tensor_parallel and context_parallel say it", "accelerator_config sharded_ddp"),
        neutral("local_rank", "torchrun's environment says it"),
        noted("there are no such devices here", "tpu_num_cores tpu_metrics_debug"),
        noted("--debug shows the traceback of an error", "debug"),
        noted("qwenkit bench train measures memory", skip_memory_metrics=True),
        neutral("past_index ray_scope", "only with kinds of models and searches that are not here"),
        noted(_UPLOAD, "push_to_hub"),
        neutral(
            "hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision push_to_hub_model_id "
            "push_to_hub_organization push_to_hub_token",
            "only with push_to_hub",
        ),
        noted(_TRACKIO, "trackio_bucket_id trackio_static_space_id", project="huggingface", trackio_space_id="trackio"),
        neutral("generation_max_length generation_num_beams generation_config", "only with predict_with_generate"),
        refused("NEFTune is not supported", "neftune_noise_alpha"),
        refused("label smoothing is not supported; allowed is 0", "label_smoothing_factor"),
        refused("Adafactor is not supported; allowed is optim adamw or adamw_8bit", "adafactor"),
        refused("arguments of optimizers are not supported; adam_beta1, adam_beta2, adam_epsilon are", "optim_args"),
        refused("GaLore-like optimizers are not supported", "optim_target_modules"),
    )
)
