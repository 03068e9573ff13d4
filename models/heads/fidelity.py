"""How much of a model another one has kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over tokens.

    Attributes:
        original_loss, changed_loss: nats per token.
        kl: divergence of the changed model's distribution from the original's, KL(original ‖
            changed), nats.
        agreement: share of tokens for which both find the same token most likely.
    """

    original_loss: float
    changed_loss: float
    kl: float
    agreement: float


def compare(original: Transformer, changed: Transformer, batches: Sequence[Tensor]) -> Fidelity:
    """Run both on int64 `[batch, tokens]` each."""
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for ids in batches:
        one, other = (model.logits(ids[:, :-1]).flatten(0, 1) for model in (original, changed))
        targets = ids[:, 1:].flatten()
        logs = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
        sums += torch.stack(
            [
                cross_entropy(one, targets, reduction="sum"),
                cross_entropy(other, targets, reduction="sum"),
                kl_div(logs[1], logs[0], reduction="sum", log_target=True),
                (one.argmax(dim=-1) == other.argmax(dim=-1)).sum(),
            ]
        ).to(sums)
        count += len(targets)
    return Fidelity(*(sums / count).tolist())
