"""What a model can do, in numbers: perplexity, and what quantization costs. Stands on engine.llm."""
