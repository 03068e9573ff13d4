"""How many bytes of keys and values a step has to read at least."""

from collections import Counter
from collections.abc import Sequence

from models.config import ModelConfig, Retention


class KVReads:
    """Counts each key and value that a query of a step sees, once for each sequence.

    For a step of decodes it is the sum of `ModelConfig.kv_bytes` over the sequences, without a
    loop over layers.

    Args:
        config: with the types that the engine uses.
    """

    def __init__(self, config: ModelConfig) -> None:
        sizes: Counter[Retention] = Counter()
        for index, heads in enumerate(config.layers):
            for retention, kv_heads in config.retentions(index).items():
                sizes[retention] += 2 * len(kv_heads) * config.kv_row_bytes(heads)
        self._whole = sizes.pop(Retention(), 0)
        # A window moves with each query, so that new tokens see one more key each.
        self._windows = [
            (retention.window - 1 + retention.sink_tokens, size)
            for retention, size in sizes.items()
            if retention.window is not None
        ]

    def count(self, starts: Sequence[int], num_tokens: int) -> int:
        """Args:
        starts: of each sequence, tokens that were computed before.
        num_tokens: that all of them compute.
        """
        num_bytes = self._whole * (sum(starts) + num_tokens)
        for reach, size in self._windows:
            num_bytes += size * (sum([min(start, reach) for start in starts]) + num_tokens)
        return num_bytes
