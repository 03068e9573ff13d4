"""What was hidden is recovered exactly, where merging without alignment fails."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.config import HeadConfig, ModelConfig, QKNorm
from models.errors import ConfigError
from models.heads.alignment import align
from models.heads.convert import MergeMethod, convert
from models.heads.fidelity import compare
from models.heads.inputs import head_inputs
from models.heads.weights import HeadWeights
from models.positions import Alibi, RopeConfig
from models.transformer import Transformer
from tests.models.heads.planted import NUM_HEADS, grouped_model, hide, shape, token_ids

BATCHES = [token_ids(0), token_ids(1)]
NEW = token_ids(9)


def error(one: Transformer, other: Transformer, ids: Tensor = NEW) -> float:
    return float((one.logits(ids) - other.logits(ids)).abs().max())


SHAPES = {
    "rotary": shape(),
    "part rotary": shape(rope=RopeConfig(10_000.0, 4)),
    "interleaved": shape(rope=RopeConfig(10_000.0, 8, interleaved=True)),
    "no rotation": shape(rope=None),
    "biases": shape().replace(qkv_bias=True, output_bias=True),
    "temperatures": shape(temperature=(0.5, 0.8, 1.0, 1.2, 1.5, 2.0)),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_planted_groups_are_recovered(config: ModelConfig) -> None:
    if config.layers[0].temperature is not None:
        config = config.replace(layers=(replace(config.layers[0], temperature=(0.7,) * 6),) * 2)
    model = grouped_model(config)
    hidden, copies = hide(model)
    assert error(model, hidden) <= 1e-5
    found = convert(hidden, 2, BATCHES, refit=False)
    assert found.groups == copies, "adjusted Rand index 1"
    assert error(hidden, found.model) <= 1e-4
    assert [heads.num_kv_heads for heads in found.model.config.layers] == [2, 2]
    naive = convert(hidden, 2, BATCHES, method="mean", regroup=False, refit=False)
    assert error(hidden, naive.model) > 1e-1
    regrouped = convert(hidden, 2, BATCHES, method="mean", refit=False)
    assert error(hidden, regrouped.model) > 1e-1, "alignment is needed, not grouping alone"


@pytest.mark.parametrize("method", ["first", "mean", "align"])
def test_equal_heads_merge_without_loss(method: MergeMethod) -> None:
    hidden, copies = hide(grouped_model(shape()), turned=False)
    found = convert(hidden, 2, BATCHES, method=method)
    assert found.groups == copies
    assert error(hidden, found.model) <= 1e-4
    one, _ = hide(grouped_model(shape(num_kv_heads=1)), turned=False)
    assert error(one, convert(one, 1, BATCHES, method=method).model) <= 1e-4


def test_the_same_number_is_the_same_model() -> None:
    model, _ = hide(grouped_model(shape()))
    found = convert(model, NUM_HEADS, BATCHES)
    states = model.state_dict(), found.model.state_dict()
    assert found.model.config == model.config
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert found.groups == [[[head] for head in range(NUM_HEADS)]] * 2


@pytest.mark.parametrize("name", ["rotary", "part rotary", "interleaved", "no rotation", "biases"])
def test_alignment_alone_changes_nothing(name: str) -> None:
    model, _ = hide(grouped_model(SHAPES[name].replace(dtype="float64"), dtype=torch.float64))
    state = model.state_dict()
    for index, attention in enumerate(model.attentions):
        hidden = head_inputs(model, BATCHES[0])[index].hidden.flatten(0, 1)
        if attention.qkv.bias is not None:
            hidden = torch.cat((hidden, torch.ones(len(hidden), 1)), dim=1)
        weights = HeadWeights.of(attention)
        aligned = align(weights, [[0, 1, 2], [3, 4, 5]], hidden.T @ hidden, attention.heads)
        assert (aligned.key - weights.key).abs().max() > 0.1, "something was turned"
        for part, tensor in aligned.parameters(attention).items():
            state[f"layers.{index}.attention.{part}"] = tensor
    other = Transformer(model.config)
    other.load_state_dict(state, assign=True)
    # Logits are float32 in any case.
    difference = model.forward_dense(NEW) - other.forward_dense(NEW)
    assert difference.abs().max() <= 1e-10


def test_more_heads_and_more_work_lose_less() -> None:
    model = grouped_model(shape(num_kv_heads=NUM_HEADS))
    losses = {
        name: compare(model, convert(model, count, BATCHES, **how).model, BATCHES).kl
        for name, count, how in (
            ("6", 6, {}),
            ("3", 3, {}),
            ("1", 1, {}),
            ("3 unaligned", 3, {"method": "mean", "regroup": False, "refit": False}),
            ("3 without refit", 3, {"refit": False}),
        )
    }
    assert losses["6"] == pytest.approx(0, abs=1e-6)
    order = ["6", "3", "1"]
    assert all(losses[a] < losses[b] for a, b in pairwise(order))
    assert losses["3"] < losses["3 without refit"] < losses["3 unaligned"]


def test_layers_may_differ() -> None:
    model, _ = hide(grouped_model(shape()))
    found = convert(model, [3, 6], BATCHES)
    assert [heads.num_kv_heads for heads in found.model.config.layers] == [3, 6]
    assert found.model.config.kv_bytes_per_token() == 9 / 12 * model.config.kv_bytes_per_token()
    one, other = (m.attentions[1].qkv.weight for m in (model, found.model))
    assert torch.equal(one, other)


def test_sinks_and_temperatures_move_with_their_heads() -> None:
    config = shape(learned_sinks=True, temperature=(0.5, 0.8, 1.0, 1.2, 1.5, 2.0), num_kv_heads=6)
    model = grouped_model(config)
    generator = torch.Generator().manual_seed(0)
    for attention in model.attentions:
        assert attention.sinks is not None
        attention.sinks.normal_(generator=generator)
        # Heads in pairs whose members are far apart.
        key, value = attention.qkv.weight.split(48)[1:]
        key[24:], value[24:] = key[:24].clone(), value[:24].clone()
    found = convert(model, 3, BATCHES, refit=False)
    assert found.groups == [[[0, 3], [1, 4], [2, 5]]] * 2
    assert found.model.config.layers[0].temperature == (0.5, 1.2, 0.8, 1.5, 1.0, 2.0)
    assert error(model, found.model) <= 1e-4


@pytest.mark.parametrize(
    ("config", "wanted", "message"),
    [
        (shape(), 3, "num_kv_heads of layer 0 is 3; allowed: a divisor of 2"),
        (shape(), 0, "num_kv_heads of layer 0 is 0; allowed: a divisor of 2"),
        (shape(), [2, 1, 1], r"num_kv_heads is \[2, 1, 1\]; allowed: one number, or one for each"),
        (shape(window=(4,) * 6), 1, "window is .*; allowed: one number"),
        (shape(clip_qkv=3.0), 1, "clip_qkv is 3.0; allowed: none"),
        (shape(rope=None, alibi=Alibi((0.5,) * 6)), 1, "alibi is .*; allowed: none"),
        (shape(qk_norm=QKNorm("rms_norm", "each_head", 1e-6)), 1, "qk_norm is 'each_head'; allow"),
    ],
)
def test_refusals(config: ModelConfig, wanted: int | list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(grouped_model(config), wanted, BATCHES)


def test_a_norm_that_heads_share_is_kept() -> None:
    norm = QKNorm("rms_norm", "head", 1e-6)
    hidden, copies = hide(grouped_model(shape(qk_norm=norm)), turned=False)
    found = convert(hidden, 2, BATCHES)
    assert found.groups == copies
    assert error(hidden, found.model) <= 1e-4


def test_head_config_of_a_merged_layer_is_that_of_its_kind() -> None:
    hidden, _ = hide(grouped_model(shape()))
    kinds = {n: convert(hidden, n, BATCHES).model.config.layers[0].kind for n in (6, 2, 1)}
    assert kinds == {6: "mha", 2: "gqa", 1: "mqa"}
    assert isinstance(hidden.config.layers[0], HeadConfig)
