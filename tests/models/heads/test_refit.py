"""Refitted output projections are those of a least-squares problem that numpy solves."""

import numpy as np
import torch

from models.heads.convert import convert
from models.heads.inputs import head_inputs
from models.heads.refit import refit_outputs
from tests.models.heads.planted import grouped_model, shape, token_ids


def test_the_weights_are_those_of_a_ridge_regression() -> None:
    batches = [token_ids(0), token_ids(1)]
    original = grouped_model(shape(num_kv_heads=6))
    changed = convert(original, 2, batches, refit=False).model
    before = changed.attentions[1].output.weight.clone().double().numpy()
    rope = original.config.layers[0].rope
    assert rope is not None
    rotation = original.rotation(rope, torch.arange(24).repeat(4))
    read: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []

    def keep(attended: torch.Tensor) -> torch.Tensor:
        read.append(attended.transpose(1, 2).reshape(-1, 48))
        return attended

    for ids in batches:
        hidden = head_inputs(original, ids)[1].hidden.flatten(0, 1)
        wanted.append(original.attentions[1].forward_dense(hidden, rotation, 4))
        changed.attentions[1].forward_dense(hidden, rotation, 4, edit=keep)
    inputs, outputs = (torch.cat(parts).double().numpy() for parts in (read, wanted))
    ridge = np.sqrt(1e-3 * np.mean(np.sum(inputs**2, axis=0)))
    rows = np.concatenate((inputs, ridge * np.eye(48)))
    targets = np.concatenate((outputs, ridge * before.T))
    expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    refit_outputs(changed, original, [0, 1], batches)
    assert np.abs(changed.attentions[1].output.weight.numpy() - expected).max() <= 1e-5
    assert np.abs(before - expected).max() > 1e-2
