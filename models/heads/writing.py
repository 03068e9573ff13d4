"""How much heads add to what goes through the layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.transformer import Transformer


@torch.inference_mode()
def written_sizes(model: Transformer, input_ids: Tensor, means: Sequence[Tensor]) -> list[Tensor]:
    """Size of what a head adds, its mean taken off, relative to that of what its layer is given:
    mean |W (read - mean)| / mean |stream|, over tokens; float64 `[heads]` of each layer.

    Args:
        input_ids: int64 `[batch, tokens]`.
        means: of `models.heads.gates.head_means`.
    """
    streams: list[Tensor] = []
    sizes: list[Tensor] = []

    def keep_mean(_: Any, arguments: tuple[Any, ...]) -> None:
        streams.append(arguments[0].double().norm(dim=-1).mean())

    def measure(layer: int, attended: Tensor) -> Tensor:
        changes = (attended - means[layer][:, None]).double()
        weight = model.attentions[layer].output.dense_weight.double()
        columns = weight.unflatten(1, (attended.shape[1], -1)).transpose(0, 1)
        # |W x|² = x' (W' W) x: nothing as wide as the model for each head and token.
        gram = columns.transpose(1, 2) @ columns
        written = ((changes @ gram) * changes).sum(dim=-1).clamp(min=0).sqrt()
        sizes.append(written.mean(dim=(0, 2)) / streams[layer])
        return attended

    layers = [model.get_submodule(f"layers.{index}") for index in range(model.config.num_layers)]
    handles = [layer.register_forward_pre_hook(keep_mean) for layer in layers]
    try:
        model.forward_dense(input_ids, edit=measure)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
