"""Other trainers' commands and files, translated: LLaMA-Factory's YAML, Qwen's finetune.py, DeepSpeed's JSON, MindFormers."""
