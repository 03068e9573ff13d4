"""Makes the demo model: a corpus from the standard library, a tokenizer, a short training."""
