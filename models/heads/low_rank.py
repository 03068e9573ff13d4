"""Projections of a low rank: each weight becomes a product of two smaller ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.errors import ConfigError
from models.linear import Linear
from models.transformer import Transformer

_RIDGE = 1e-6


@torch.inference_mode()
def factorise(model: Transformer, rank: int, batches: Sequence[Tensor]) -> Transformer:
    """A copy of a model in which each projection of attention and feed-forward blocks has a rank.

    Args:
        rank: below the one at which the two matrices of some projection would be no smaller than
            its weight.
        batches: int64 `[batch, tokens]` each, text to calibrate with.

    Raises:
        ConfigError: the rank is too large, or projections have one already.
    """
    projections = _projections(model)
    _check_rank(model, projections, rank)
    grams = _input_grams(model, projections, batches)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module not in projections:
            state[name] = tensor.clone()
        elif kind == "bias":
            state[f"{module}.expand.bias"] = tensor.clone()
        else:
            expand, reduce = low_rank(tensor.double(), grams[module], rank)
            state[f"{module}.expand.weight"] = expand.to(tensor.dtype)
            state[f"{module}.reduce.weight"] = reduce.to(tensor.dtype)
    result = Transformer(model.config.replace(projection_rank=rank))
    result.load_state_dict(state, assign=True)
    return result.eval().requires_grad_(False)


def low_rank(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Matrices `[outputs, rank]` and `[rank, inputs]` whose product changes the outputs of inputs
    X least, in the sum of squares.

    The outputs X·Wᵀ are projected to their first principal directions. That is the truncated
    singular value decomposition of the weight after whitening the inputs (Wang et al. 2024,
    SVD-LLM), without the whitening's inverse.

    Args:
        weight: float64 `[outputs, inputs]`.
        gram: Xᵀ·X, float64 `[inputs, inputs]`.
    """
    # What no input shows is kept too, if there is room for it.
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    _, directions = torch.linalg.eigh(weight @ (gram + ridge) @ weight.T)
    expand = directions[:, -rank:].contiguous()
    return expand, expand.T @ weight


def _projections(model: Transformer) -> dict[str, Linear]:
    modules = model.layers.named_modules(prefix="layers")
    return {name: module for name, module in modules if isinstance(module, Linear)}


def _check_rank(model: Transformer, projections: dict[str, Linear], rank: int) -> None:
    if (already := model.config.projection_rank) is not None:
        raise ConfigError("projection_rank", already, "none: projections have a rank already")
    largest, name = min(
        ((m.weight.numel() - 1) // (m.in_features + m.out_features), name)
        for name, m in projections.items()
    )
    if not 1 <= rank <= largest:
        allowed = f"1 to {largest}, above which {name} would not become smaller"
        raise ConfigError("rank", rank, allowed)


def _input_grams(
    model: Transformer, projections: dict[str, Linear], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Of what each projection multiplies, float64 `[inputs, inputs]`."""
    grams = {
        name: torch.zeros(module.in_features, module.in_features, dtype=torch.float64)
        for name, module in projections.items()
    }

    def watch(name: str) -> Any:
        def add(_: Any, arguments: tuple[Any, ...]) -> None:
            x, before, *_ = (*arguments, None)
            rows = (x if before is None else before(x)).flatten(0, -2).double()
            grams[name] = grams[name].to(rows.device) + rows.T @ rows

        return add

    handles = [each.register_forward_pre_hook(watch(name)) for name, each in projections.items()]
    try:
        for ids in batches:
            model.forward_dense(ids)
    finally:
        for handle in handles:
            handle.remove()
    return grams
