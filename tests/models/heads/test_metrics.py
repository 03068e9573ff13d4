"""Planted patterns have the scores that they were planted with."""

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.heads.inputs import attention_weights, head_inputs
from models.heads.metrics import (
    best_head,
    induction_score,
    previous_token_score,
    repeat_losses,
    retrieval_score,
    sink_score,
)
from models.split_attention import split_attention
from models.train.rows import ordinary_tokens, repeated
from models.transformer import Transformer, random_model
from tests.models import tiny

PERIOD = 5
TOKENS = 2 * PERIOD


def planted(keys: list[int]) -> Tensor:
    """Each query looks at one key: weights `[2, 1, tokens, tokens]`."""
    weights = torch.zeros(2, 1, len(keys), len(keys))
    weights[:, :, range(len(keys)), keys] = 1.0
    return weights


PREVIOUS = planted([max(i - 1, 0) for i in range(TOKENS)])
INDUCTION = planted([max(i - PERIOD + 1, 0) for i in range(TOKENS)])
FIRST = planted([0] * TOKENS)


def test_planted_heads_have_their_scores() -> None:
    edge = 1 / (TOKENS - 1)  # query 1 can look back at <bos> only
    heads = torch.cat((PREVIOUS, INDUCTION, FIRST), dim=1)
    assert previous_token_score(heads).tolist() == pytest.approx([1, edge, edge])
    assert induction_score(heads, PERIOD).tolist() == pytest.approx([0, 1, 0])
    assert float(sink_score(heads)[2]) == 1
    assert float(sink_score(heads)[0]) == pytest.approx(edge)


def test_the_score_is_the_mean_over_queries_that_saw_their_token() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, TOKENS, TOKENS, generator=generator)
    expected = [
        torch.stack(
            # <bos> is token 0: the token of query i was at i - PERIOD, and 1 is the first of them.
            [weights[b, h, i, i - PERIOD + 1] for b in range(2) for i in range(1 + PERIOD, TOKENS)]
        ).mean()
        for h in range(3)
    ]
    assert induction_score(weights, PERIOD).tolist() == pytest.approx([float(e) for e in expected])


def test_retrieval_is_the_mean_over_queries_and_their_keys() -> None:
    weights = torch.rand(2, 3, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([(0, 9, 2), (1, 8, 8), (1, 7, 0)])
    expected = [
        float(weights[0, h, 9, 2] + weights[1, h, 8, 8] + weights[1, h, 7, 0]) / 3 for h in range(3)
    ]
    assert retrieval_score(weights, places).tolist() == pytest.approx(expected)


def test_the_best_head_is_that_of_all_layers() -> None:
    best = best_head([torch.tensor([0.1, 0.6]), torch.tensor([0.2, 0.3, 0.7])])
    assert (best.layer, best.head, str(best)) == (1, 2, "0.700 (layer 1, head 2)")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(tiny.llama(), seed=0).requires_grad_(False)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return repeated(3, PERIOD, TOKENS, ordinary_tokens(61), torch.Generator().manual_seed(0))


def test_weights_are_those_of_each_head_alone(model: Transformer, ids: Tensor) -> None:
    weights, inputs = attention_weights(model, ids), head_inputs(model, ids)
    rope = model.config.layers[0].rope
    assert rope is not None
    rotation = model.rotation(rope, torch.arange(ids.shape[1]))
    for attention, seen, of_layer in zip(model.attentions, inputs, weights, strict=True):
        assert of_layer.sum(dim=-1).sub(1).abs().max() <= 1e-6
        for row in range(len(ids)):
            split = split_attention(attention, seen.hidden[row], rotation)
            assert (split.weights - of_layer[row]).abs().max() <= 1e-6


@pytest.mark.parametrize("config", [tiny.gpt2(), tiny.llama(residual="sandwich_norm")])
def test_weights_exist_for_other_shapes(config: ModelConfig) -> None:
    other = random_model(config, seed=0)
    weights = attention_weights(other, torch.arange(6)[None])
    assert [w.shape for w in weights] == [
        (1, heads.num_heads, 6, 6) for heads in other.config.layers
    ]


def test_losses_are_those_of_the_halves(model: Transformer, ids: Tensor) -> None:
    losses = -model.logits(ids[:, :-1]).log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    first, second = repeat_losses(model, ids)
    assert first == pytest.approx(float(losses[:, :PERIOD].mean()), rel=1e-5)
    assert second == pytest.approx(float(losses[:, PERIOD + 1 :].mean()), rel=1e-5)


def test_an_ablated_head_is_one_whose_output_columns_are_zero(
    model: Transformer, ids: Tensor
) -> None:
    ablated = repeat_losses(model, ids, [(0, 1), (1, 3), (0, 2)])
    zeroed = random_model(model.config, seed=0).requires_grad_(False)
    for layer, head in ((0, 1), (1, 3), (0, 2)):
        zeroed.attentions[layer].output.weight[:, 8 * head : 8 * head + 8] = 0.0
    assert ablated == pytest.approx(repeat_losses(zeroed, ids), abs=1e-6)
    assert ablated != pytest.approx(repeat_losses(model, ids), abs=1e-4)
