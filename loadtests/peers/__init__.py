"""Our engine beside other servers of language models, in one run."""
