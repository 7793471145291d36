"""Floor 7. Policies from and for other frameworks: Hugging Face transformers, T5X."""
