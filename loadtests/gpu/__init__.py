"""On a GPU: whether the engine is right, how fast it is, and where the time goes."""
