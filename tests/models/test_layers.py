"""Normalisation and feed-forward blocks against their formulas in float64."""

import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from models.config import Activation, ModelConfig
from models.layers import MLP, MixtureOfExperts, RMSNorm, make_norm, rms_norm
from tests.models import numpy_oracle, tiny
from tests.models.numpy_oracle import ACTIVATIONS, array


# The smallest inputs are where eps, and where it is added, decides.
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm_equals_its_formula(
    size: float, dtype: torch.dtype, bar: float, unit_offset: bool
) -> None:
    norm = RMSNorm(24, eps=1e-5, unit_offset=unit_offset).to(dtype)
    torch.nn.init.normal_(norm.weight, 0.0 if unit_offset else 1.0, 0.3)
    x = size * torch.randn(7, 24, dtype=dtype)
    weight = array(norm.weight) + (1.0 if unit_offset else 0.0)
    for ours, row in zip(norm(x), x, strict=True):
        expected = numpy_oracle.rms_norm(array(row), weight, 1e-5)
        assert np.abs(array(ours) - expected).max() <= bar


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_equals_its_formula(bias: bool) -> None:
    norm = make_norm(tiny.gpt2(norm_eps=1e-3, norm_bias=bias)).double()
    assert isinstance(norm, torch.nn.LayerNorm)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    assert (norm.bias is not None) == bias
    if bias:
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    x = 0.1 * torch.randn(7, 24, dtype=torch.float64)
    for ours, row in zip(norm(x), x, strict=True):
        expected = numpy_oracle.layer_norm(array(row), array(norm.weight), 1e-3)
        if bias:
            expected += array(norm.bias)
        assert np.abs(array(ours) - expected).max() <= 1e-12


def test_each_head_is_normalised_with_weights_of_its_own() -> None:
    x, weight = torch.randn(5, 3, 8).double(), torch.randn(3, 8).double()
    for unit_offset in (False, True):
        normed = rms_norm(x, weight, 1e-3, unit_offset=unit_offset)
        for token in range(5):
            for head in range(3):
                expected = numpy_oracle.rms_norm(
                    array(x[token, head]), array(weight[head]) + unit_offset, 1e-3
                )
                assert np.abs(array(normed[token, head]) - expected).max() <= 1e-12


def test_an_offset_is_added_before_rounding() -> None:
    """In bfloat16 most of a small weight is lost beside 1; Gemma rounds the product only."""
    x = torch.randn(64, 24).bfloat16()
    weight = torch.randn(24).mul(0.02).bfloat16()
    exact = [numpy_oracle.rms_norm(array(row), array(weight) + 1.0, 1e-5) for row in x]
    expected = torch.from_numpy(np.stack(exact)).bfloat16()
    ours = rms_norm(x, weight, 1e-5, unit_offset=True)
    assert ours.dtype == torch.bfloat16
    assert (ours != expected).float().mean() < 0.01, "rounded once"
    assert (rms_norm(x, 1 + weight, 1e-5) != expected).float().mean() > 0.1


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


def make_experts() -> MixtureOfExperts:
    config = tiny.llama(num_experts=5, num_experts_per_token=2, swiglu_limit=1.5)
    experts = MixtureOfExperts(config).double().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0.0, 0.5)
    return experts


def test_a_mixture_of_experts_equals_its_formula() -> None:
    experts = make_experts()
    x = 2 * torch.randn(9, 24, dtype=torch.float64)
    for ours, row in zip(experts(x), x, strict=True):
        expected = numpy_oracle.experts(
            array(row),
            (array(experts.router.weight), array(experts.router.bias)),
            (array(experts.up_weight), array(experts.up_bias)),
            (array(experts.down_weight), array(experts.down_bias)),
            num_picked=2,
            limit=1.5,
        )
        assert np.abs(array(ours) - expected).max() <= 1e-12


def test_a_mixture_of_experts_is_that_of_gpt_oss() -> None:
    experts = make_experts().float()
    config = GptOssConfig(
        hidden_size=24, intermediate_size=40, num_local_experts=5, num_experts_per_tok=2
    )
    config.swiglu_limit = 1.5
    theirs = GptOssMLP(config).requires_grad_(False)
    theirs.router.load_state_dict(experts.router.state_dict())
    theirs.experts.gate_up_proj.copy_(experts.up_weight)
    theirs.experts.gate_up_proj_bias.copy_(experts.up_bias)
    theirs.experts.down_proj.copy_(experts.down_weight)
    theirs.experts.down_proj_bias.copy_(experts.down_bias)
    x = 2 * torch.randn(9, 24)
    expected, _ = theirs(x[None])
    assert (experts(x) - expected[0]).abs().max() <= 2e-5
