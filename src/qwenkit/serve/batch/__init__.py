"""OpenAI's Files and Batches: JSONL in, JSONL out, on the same engine at lower priority; every line exactly once."""
