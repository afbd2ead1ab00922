"""What a Qwen is: plain single-device PyTorch over a flat token stream. Imports ops."""
