"""Loss against bytes of cache, and against heads removed: measured and drawn."""
