"""Normalisation and feed-forward blocks against their formulas in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.config import Activation, ModelConfig
from models.layers import MLP, RMSNorm, make_norm
from tests.models import tiny
from tests.models.numpy_oracle import Array

ACTIVATIONS: dict[Activation, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    mean_square: Array = (x**2).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


# The smallest inputs are where eps, and where it is added, decides.
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_rms_norm_equals_its_formula(size: float, dtype: torch.dtype, bar: float) -> None:
    norm = RMSNorm(24, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x = size * torch.randn(7, 24, dtype=dtype)
    weight = norm.weight.detach().double().numpy()
    expected = rms_norm(x.double().numpy(), weight, 1e-5)
    assert np.abs(norm(x).detach().double().numpy() - expected).max() <= bar


def test_layer_norm_equals_its_formula() -> None:
    norm = make_norm(tiny.gpt2(norm_eps=1e-3)).double()
    assert isinstance(norm, torch.nn.LayerNorm)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    x = 0.1 * torch.randn(7, 24, dtype=torch.float64)
    centred = x.numpy() - x.numpy().mean(axis=-1, keepdims=True)
    expected = rms_norm(centred, norm.weight.detach().numpy(), 1e-3) + norm.bias.detach().numpy()
    assert np.abs(norm(x).detach().numpy() - expected).max() <= 1e-12


def test_the_configuration_chooses_norm_and_eps() -> None:
    norm = make_norm(tiny.llama(norm_eps=0.25))
    assert isinstance(norm, RMSNorm)
    assert norm.eps == 0.25
    assert norm.weight.shape == (24,)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_its_formula(activation: Activation, bias: bool, gated: bool) -> None:
    config: ModelConfig = tiny.llama(activation=activation, mlp_bias=bias, gated_mlp=gated)
    mlp = MLP(config).double().requires_grad_(False)
    x = 3 * torch.randn(5, config.hidden_size, dtype=torch.float64)
    act = np.vectorize(ACTIVATIONS[activation])
    wide = mlp.up.weight.numpy() @ x.numpy().T
    if bias:
        wide += mlp.up.bias.numpy()[:, None]
    if gated:
        # Gate rows first.
        gate, up = wide[: config.intermediate_size], wide[config.intermediate_size :]
        hidden = act(gate) * up
    else:
        hidden = act(wide)
    expected = (mlp.down.weight.numpy() @ hidden).T
    if bias:
        expected += mlp.down.bias.numpy()
    assert (mlp.up.bias is not None) == bias
    assert np.abs(mlp(x).numpy() - expected).max() <= 1e-12
