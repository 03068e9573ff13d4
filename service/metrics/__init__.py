"""What a replica counts and measures, as Prometheus reads it."""
