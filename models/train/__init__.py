"""Makes the demo model: a corpus from the Python standard library, a tokenizer, a short training."""
