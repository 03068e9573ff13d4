"""Useless heads come last by every ranking, others by their loss; gradients are differences."""

import pytest
import torch
from torch import Tensor

from models.errors import ConfigError
from models.heads.gates import gate_heads, head_means, open_gates, text_loss
from models.heads.importance import (
    RANKINGS,
    Ranking,
    least_important,
    least_important_by_layer,
    rank_heads,
)
from models.transformer import Transformer, random_model
from tests.models.heads.planted import own_text, shape, token_ids

BATCHES = [token_ids(0), token_ids(1)]
USELESS = [(0, 2), (1, 4)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Two heads write nothing and look everywhere alike."""
    planted = random_model(shape(num_kv_heads=6), seed=0).requires_grad_(False)
    head_dim = planted.config.layers[0].head_dim
    for layer, head in USELESS:
        own = slice(head * head_dim, (head + 1) * head_dim)
        attention = planted.attentions[layer]
        attention.output.weight[:, own] = 0.0
        attention.qkv.weight[own] = 0.0
    planted.get_parameter("lm_head.weight").mul_(4.0)  # sure enough of what it writes
    return planted


@pytest.fixture(scope="module")
def text(model: Transformer) -> list[Tensor]:
    return list(own_text(model).split(8))


@pytest.mark.parametrize("ranking", [name for name in RANKINGS if name != "random"])
def test_useless_heads_are_last(model: Transformer, text: list[Tensor], ranking: Ranking) -> None:
    told: list[tuple[int, int]] = []
    scores = rank_heads(
        model, text, ranking, on_progress=lambda done, total: told.append((done, total))
    )
    assert [len(layer) for layer in scores] == [6, 6]
    assert least_important(scores, 2) == USELESS
    assert not told or told[-1][0] == told[-1][1]


@pytest.mark.parametrize("ranking", ["gradient", "ablation", "gates"])
def test_what_reads_losses_is_better_than_chance(
    model: Transformer, text: list[Tensor], ranking: Ranking
) -> None:
    unseen, means = own_text(model, rows=32)[16:], head_means(model, text)

    @torch.inference_mode()
    def loss_without(removed: list[tuple[int, int]]) -> float:
        gates = open_gates(model)
        for layer, head in removed:
            gates[layer][head] = 0.0
        return float(text_loss(model, unseen, gate_heads(means, gates)))

    scores = rank_heads(model, text, ranking)
    drawn = [rank_heads(model, [], "random", seed=seed) for seed in range(20)]
    for count in (2, 4, 6, 8):
        chance = sum(loss_without(least_important(each, count)) for each in drawn) / len(drawn)
        assert loss_without(least_important(scores, count)) < chance - 0.1


def test_a_gradient_is_a_difference() -> None:
    model = random_model(
        shape(num_kv_heads=6).replace(dtype="float64"), seed=0, dtype=torch.float64
    ).requires_grad_(False)
    ids = BATCHES[0]
    found = rank_heads(model, [ids], "gradient")
    means, step = head_means(model, [ids]), 2e-2  # losses are float32
    for layer, head in ((0, 3), (1, 5)):
        slopes = []
        for row in ids[:, None]:
            losses = []
            for change in (step, -step):
                gates = [gate.double() for gate in open_gates(model)]
                gates[layer][head] += change
                losses.append(float(text_loss(model, row, gate_heads(means, gates))))
            slopes.append(abs(losses[0] - losses[1]) / (2 * step))
        assert float(found[layer][head]) == pytest.approx(sum(slopes) / len(ids), rel=1e-2)


def test_entropy_is_of_what_a_head_may_look_at() -> None:
    """Equal weights in a window count as equal weights; one visible token is no choice."""
    windows = (1, 4, 4, None, None, None)
    model = random_model(shape(num_kv_heads=6, window=windows), seed=0).requires_grad_(False)
    head_dim = model.config.layers[0].head_dim
    for head in (2, 3):
        model.attentions[0].qkv.weight[head * head_dim : (head + 1) * head_dim] = 0.0
    scores = rank_heads(model, BATCHES, "entropy")[0]
    assert scores[[2, 3]].abs().max() < 1e-6
    assert scores[[1, 4, 5]].min() > 1e-3
    assert int(scores.argmax()) == 0


def test_a_confident_head_that_adds_little_matters_little() -> None:
    model = random_model(shape(num_kv_heads=6), seed=0).requires_grad_(False)
    attention, head_dim = model.attentions[0], model.config.layers[0].head_dim
    before = rank_heads(model, BATCHES, "entropy")
    best = int(before[0].argmax())
    attention.output.weight[:, best * head_dim : (best + 1) * head_dim] *= 1e-3
    after = rank_heads(model, BATCHES, "entropy")
    assert float(after[0][best]) == pytest.approx(1e-3 * float(before[0][best]), rel=1e-4)
    assert least_important(after, 1) == [(0, best)]


def test_entropy_compares_layers_by_what_they_are_given() -> None:
    """The first layer, which norms what it is given, adds as much to twice as much."""
    model = random_model(shape(num_kv_heads=6), seed=0).requires_grad_(False)
    before = rank_heads(model, BATCHES, "entropy")[0]
    model.get_parameter("embed_tokens.weight").mul_(2.0)
    after = rank_heads(model, BATCHES, "entropy")[0]
    assert after.tolist() == pytest.approx((before / 2).tolist(), rel=1e-2)


def test_the_group_is_what_is_ranked() -> None:
    model = random_model(shape(num_kv_heads=2), seed=0, dtype=torch.bfloat16)
    for ranking in RANKINGS:
        assert [len(layer) for layer in rank_heads(model, BATCHES, ranking)] == [2, 2]


@pytest.mark.parametrize("ranking", ["entropy", "gradient", "ablation", "gates"])
def test_without_text_there_is_no_ranking(model: Transformer, ranking: Ranking) -> None:
    with pytest.raises(ConfigError, match=r"batches is \[\]; allowed: one or more"):
        rank_heads(model, [], ranking)


def test_seeds_draw() -> None:
    model = random_model(shape(num_kv_heads=6), seed=0)
    one, again, other = (rank_heads(model, [], "random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0])
    assert not torch.equal(one[0], other[0])


def test_each_layer_keeps_one() -> None:
    scores = [torch.tensor([0.1, 0.2]), torch.tensor([3.0, 2.0, 1.0])]
    assert least_important(scores, 0) == []
    assert least_important(scores, 2) == [(0, 0), (1, 2)]
    assert least_important(scores, 3) == [(0, 0), (1, 1), (1, 2)]
    with pytest.raises(ConfigError, match="heads to remove is 4; allowed: 0 to 3"):
        least_important(scores, 4)


def test_so_many_of_each_layer() -> None:
    scores = [torch.tensor([0.1, 0.2]), torch.tensor([3.0, 2.0, 1.0])]
    assert least_important_by_layer(scores, [2, 1]) == [(1, 1), (1, 2)]
    with pytest.raises(ConfigError, match="one number for each of 2 layers"):
        least_important_by_layer(scores, [2])
    with pytest.raises(ConfigError, match="heads to keep of layer 1 is 0; allowed: 1 to 3"):
        least_important_by_layer(scores, [1, 0])
