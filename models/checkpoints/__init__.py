"""Hugging Face directories to `ModelConfig` and weights. Families are data, not subclasses."""
