"""The commands of `headroom`: each parses, prints, and leaves the work to others."""
