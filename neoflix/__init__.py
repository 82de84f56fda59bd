"""Fine-tune GPT-Neo on short texts with DeepSpeed, and sample from it."""
