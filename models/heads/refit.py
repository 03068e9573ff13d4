"""Output projections for heads that have changed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.heads.inputs import head_inputs
from models.transformer import Transformer

_RIDGE = 1e-3


@torch.inference_mode()
def refit_outputs(
    changed: Transformer, original: Transformer, layers: Sequence[int], batches: Sequence[Tensor]
) -> None:
    """Set the output projections of some layers so that, given the original's inputs, each layer's
    attention hands on what the original's does, as nearly as can be.

    Ridge regression around the present weights: on the calibration inputs the squared error cannot
    grow.

    Args:
        batches: int64 `[batch, tokens]` each.
    """
    grams: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    for ids in batches:
        batch, num_tokens = ids.shape
        positions = torch.arange(num_tokens, device=ids.device).repeat(batch)
        lengths = torch.full_like(positions, num_tokens)
        inputs = head_inputs(original, ids)
        for index in layers:
            old, new = original.attentions[index], changed.attentions[index]
            hidden = inputs[index].hidden.flatten(0, 1)
            rope = old.heads.rope
            rotation = None if rope is None else original.rotation(rope, positions, lengths)
            read: list[Tensor] = []

            def keep(attended: Tensor, read: list[Tensor] = read) -> Tensor:
                read.append(attended.transpose(1, 2).flatten(0, 1).flatten(-2).double())
                return attended

            difference = old.forward_dense(hidden, rotation, batch) - new.forward_dense(
                hidden, rotation, batch, edit=keep
            )
            gram, error = read[0].T @ read[0], read[0].T @ difference.double()
            grams[index] = grams[index] + gram if index in grams else gram
            errors[index] = errors[index] + error if index in errors else error
    for index in layers:
        gram = grams[index]
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        change = torch.linalg.solve(gram + ridge, errors[index])
        weight = changed.attentions[index].output.get_parameter("weight")
        weight.add_(change.T.to(changed.dtype))
