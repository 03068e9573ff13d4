"""One attention on its own, outside of any generation: described, bounded, computed."""
