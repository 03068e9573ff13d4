"""Projections of a low rank lose what the smallest singular values say, and are served as such."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import load_model
from models.checkpoints.writer import save_model
from models.config import ModelConfig
from models.cpu.linear import WeightDType
from models.errors import ConfigError
from models.heads.convert import convert
from models.heads.fidelity import compare
from models.heads.inputs import head_inputs
from models.heads.low_rank import factorise, low_rank
from models.train.head_options import head_temperatures
from models.transformer import Transformer
from service.engine import EngineRequest
from tests.engine.tiny import finish_all, greedy, tiny_engine
from tests.models import tiny
from tests.models.heads.planted import token_ids

CONFIG = tiny.llama(hidden_size=32, intermediate_size=48)
BIASES = CONFIG.replace(qkv_bias=True, output_bias=True, mlp_bias=True)
BATCHES = [token_ids(0), token_ids(1)]
RANK = 12


def projections(model: Transformer) -> dict[str, Any]:
    return {
        f"{index}.{name}": module
        for index, layer in enumerate(cast(Iterable[Any], model.layers))
        for name, module in (
            ("qkv", layer.attention.qkv), ("output", layer.attention.output),
            ("up", layer.mlp.up), ("down", layer.mlp.down),
        )
    }  # fmt: skip


def dense(model: Transformer) -> Transformer:
    """The same model with each product multiplied out."""
    state = {n: t for n, t in model.state_dict().items() if ".reduce." not in n}
    for name in [name for name in state if name.endswith(".expand.weight")]:
        expand, reduce = state.pop(name), model.state_dict()[name.replace("expand", "reduce")]
        state[name.replace(".expand", "")] = expand @ reduce
    state = {name.replace(".expand", ""): tensor for name, tensor in state.items()}
    result = Transformer(model.config.replace(projection_rank=None))
    result.load_state_dict(state)
    return result.requires_grad_(False)


@settings(max_examples=20)
@given(
    outputs=st.integers(2, 40), inputs=st.integers(2, 40), seed=st.integers(0, 2**16),
    share=st.floats(0, 1),
)  # fmt: skip
def test_the_error_is_the_tail_of_singular_values_behind_whitening(
    outputs: int, inputs: int, seed: int, share: float
) -> None:
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(inputs, inputs)) * np.logspace(0, 1, inputs)
    x, weight = random.normal(size=(200, inputs)) @ mixed, random.normal(size=(outputs, inputs))
    rank = 1 + round(share * (min(outputs, inputs) - 1))
    expand, reduce = (
        part.numpy() for part in low_rank(torch.tensor(weight), torch.tensor(x.T @ x), rank)
    )
    assert (expand.shape, reduce.shape) == ((outputs, rank), (rank, inputs))
    error = np.square(x @ (weight - expand @ reduce).T).sum()
    singular = np.linalg.svd(weight @ np.linalg.cholesky(x.T @ x), compute_uv=False)
    tail = np.square(singular[rank:]).sum()
    assert error == pytest.approx(tail, rel=1e-3, abs=1e-9 * np.square(singular).sum())


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_full_rank_is_the_identity_of_directions_that_were_never_seen_too(
    shape: tuple[int, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(10, shape[1], generator=generator, dtype=torch.float64)
    expand, reduce = low_rank(weight, x.T @ x, min(shape))
    assert (expand @ reduce - weight).abs().max() <= 1e-6


def test_a_model_of_low_rank_stays_the_same() -> None:
    """Each projection has rank 6; its factors say so, whatever is multiplied before it."""
    model = tiny.model(BIASES)
    for module in projections(model).values():
        left, _, right = torch.linalg.svd(module.weight, full_matrices=False)
        module.weight.copy_(left[:, :6] @ right[:6])
    small = factorise(model, 6, BATCHES)
    assert (small.logits(token_ids(9)) - model.logits(token_ids(9))).abs().max() <= 1e-4
    assert small.config == model.config.replace(projection_rank=6)


def test_calibration_text_decides_what_is_kept() -> None:
    """On it, each first projection loses less than by the decomposition of its weight alone."""
    model = tiny.model(CONFIG)
    small = factorise(model, RANK, BATCHES)
    hidden = torch.cat([head_inputs(model, ids)[0].hidden.flatten(0, 1) for ids in BATCHES])
    weight = model.attentions[0].qkv.weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :RANK] * values[:RANK]) @ right[:RANK]

    def error(other: Tensor) -> float:
        return float((hidden @ (weight - other).T).square().sum())

    assert error(small.attentions[0].qkv.dense_weight) < 0.95 * error(plain)


def test_a_larger_rank_loses_less_and_takes_what_its_matrices_take() -> None:
    model = tiny.model(CONFIG)
    losses = []
    for rank in (2, 8, 15):
        small = factorise(model, rank, BATCHES)
        losses.append(compare(model, small, [token_ids(9)]).kl)
        shapes = [(m.in_features, m.out_features) for m in projections(model).values()]
        saved = sum(i * o - rank * (i + o) for i, o in shapes)
        assert model.num_parameters - small.num_parameters == saved
        assert model.step_bytes - small.step_bytes == 4 * saved
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("config", [CONFIG, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("weight_dtype", get_args(WeightDType))
def test_the_export_is_served_with_the_tokens_of_the_product(
    config: ModelConfig, weight_dtype: WeightDType, tmp_path: Path
) -> None:
    small = factorise(tiny.model(config), RANK, BATCHES)
    save_model(small, tmp_path, weight_dtype=weight_dtype)
    again = load_model(tmp_path)
    assert again.config.replace(name=small.config.name) == small.config
    ids = token_ids(9)
    if weight_dtype == "auto":
        assert torch.equal(again.logits(ids), small.logits(ids))
    whole = dense(again)
    assert (whole.logits(ids) - again.logits(ids)).abs().max() <= 1e-5
    requests = [EngineRequest(prompt, greedy()) for prompt in ([1, 5, 9, 2], [7, 7])]
    tokens = [
        [output.token_ids for output in finish_all(tiny_engine(one), requests)]
        for one in (again, whole)
    ]
    assert tokens[0] == tokens[1]
    assert all(len(one) == 12 for one in tokens[0])


def test_what_cannot_be_is_refused() -> None:
    model = tiny.model(CONFIG)
    for rank in (0, 16):
        with pytest.raises(
            ConfigError, match=rf"rank is {rank}; allowed: 1 to 15, .* layers\.0\.attention\.output"
        ):
            factorise(model, rank, BATCHES)
    small = factorise(model, RANK, BATCHES)
    with pytest.raises(ConfigError, match="projection_rank is 12; allowed: none: projections"):
        factorise(small, RANK, BATCHES)
    with pytest.raises(ConfigError, match="projection_rank is 12; allowed: none: heads are chan"):
        convert(small, 1, BATCHES)
    with pytest.raises(ConfigError, match="a bias, a norm or a rank"), head_temperatures(small):
        pass
