"""The loss of a model while it is trained, and what general compressors make of texts."""

import bz2
import gzip
import lzma
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.train.tokenizer import BOS
from models.transformer import Transformer


def validation_rows(tokens: Tensor, num_rows: int, seq_len: int) -> Tensor:
    """Windows behind `<bos>` that are spread evenly over `[tokens]`; int64 `[rows, seq_len]`."""
    num_rows = min(num_rows, len(tokens) // seq_len)
    starts = torch.arange(num_rows)[:, None] * (len(tokens) // num_rows)
    rows = tokens[starts + torch.arange(seq_len)].long()
    rows[:, 0] = BOS
    return rows


@torch.inference_mode()
def validation_loss(model: Transformer, rows: Tensor) -> float:
    """Mean loss in nats per token on int64 `[rows, tokens]`."""
    losses = [
        cross_entropy(model.logits(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        for part in rows.to(model.device).split(8)
    ]
    sizes = [len(part) for part in rows.split(8)]
    return sum(float(loss) * size for loss, size in zip(losses, sizes, strict=True)) / len(rows)


def compressors_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """The texts behind one another, compressed as well as each compressor can."""
    data = "".join(texts).encode()
    compressed = {
        "gzip": gzip.compress(data, 9),
        "bzip2": bz2.compress(data, 9),
        "xz": lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(output) / len(data) for name, output in compressed.items()}


def xz_after_training_text(train: Sequence[str], held_out: Sequence[str]) -> float:
    """Bits per byte that the held-out texts add to an xz file of the training texts.

    The dictionary is as large as all texts: xz may refer to everything the model has read.
    """
    before, added = ("".join(texts).encode() for texts in (train, held_out))
    size = 1 << (len(before) + len(added)).bit_length()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    lengths = [len(lzma.compress(d, filters=filters)) for d in (before, before + added)]
    return 8 * (lengths[1] - lengths[0]) / len(added)
