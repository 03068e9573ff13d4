"""What heads do: their scores on patterns, and what is lost without them.

Weights are `[batch, heads, tokens, tokens]`; element `[..., i, j]` is what query i gives key j.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class BestHead:
    """The head with the highest score."""

    layer: int
    head: int
    score: float

    def __str__(self) -> str:
        return f"{self.score:.3f} (layer {self.layer}, head {self.head})"


def best_head(scores: Sequence[Tensor]) -> BestHead:
    """Of scores `[heads]` of each layer."""
    layer = max(range(len(scores)), key=lambda index: float(scores[index].max()))
    head = int(scores[layer].argmax())
    return BestHead(layer, head, float(scores[layer][head]))


def previous_token_score(weights: Tensor) -> Tensor:
    """Mean weight of the token before the query, `[heads]`; 1 if a head always looks there."""
    return weights.diagonal(offset=-1, dim1=-2, dim2=-1).float().mean(dim=(0, 2))


def induction_score(weights: Tensor, period: int) -> Tensor:
    """Mean weight, `[heads]`, of the token that came after the query's token `period` ago; of
    sequences that repeat `period` random tokens (Olsson et al. 2022).

    That is the diagonal `period - 1` behind the query. Only queries that have seen their token
    before are counted: `<bos>` and the first period are not.
    """
    diagonal = weights.diagonal(offset=1 - period, dim1=-2, dim2=-1).float()
    return diagonal[..., 2:].mean(dim=(0, 2))  # its element j is the query j + period - 1


def sink_score(weights: Tensor) -> Tensor:
    """Mean weight of the first token, the first query left out, `[heads]` (Gu et al. 2024)."""
    return weights[..., 1:, 0].float().mean(dim=(0, 2))


def retrieval_score(weights: Tensor, places: Tensor) -> Tensor:
    """Mean weight, `[heads]`, that some queries give to the key each of them should find (after Wu
    et al. 2024).

    Args:
        places: int64 `[queries, 3]`, the row, the query and its key.
    """
    row, query, key = places.unbind(dim=1)
    return weights[row, :, query, key].float().mean(dim=0)


@torch.inference_mode()
def repeat_losses(
    model: Transformer, input_ids: Tensor, without: Sequence[tuple[int, int]] = ()
) -> tuple[float, float]:
    """Losses in nats per token of the first and of the second half of `<bos>` and random tokens
    that come twice, int64 `[batch, 1 + 2 * period]`.

    The first token of the second half is left out: nothing tells that the repetition begins.

    Args:
        without: layer and head of heads that hand on zeros.
    """
    heads_of: dict[int, list[int]] = {}
    for layer, head in without:
        heads_of.setdefault(layer, []).append(head)

    def ablate(layer: int, attended: Tensor) -> Tensor:
        if layer not in heads_of:
            return attended
        attended = attended.clone()
        attended[:, heads_of[layer]] = 0.0
        return attended

    hidden = model.forward_dense(input_ids[:, :-1], edit=ablate if heads_of else None)
    logits = model.project_to_vocab(hidden)
    losses = cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    halves = losses.view(len(input_ids), 2, -1)
    return float(halves[:, 0].mean()), float(halves[:, 1, 1:].mean())
