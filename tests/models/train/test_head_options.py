"""Heads are left out, pulled apart and given temperatures as their definitions say."""

import pytest
import torch

from models.config import HeadConfig, QKNorm
from models.errors import ConfigError
from models.positions import RopeConfig
from models.train.head_options import HeadSimilarity, head_dropout, head_temperatures, mean_cosine
from models.transformer import random_model
from tests.models import tiny


def test_left_out_heads_are_zero_and_the_rest_makes_up_for_them() -> None:
    attended = torch.ones(200, 8, 3, 2)
    output = head_dropout(0.25, seed=1)(0, attended)
    per_head = output[:, :, 0, 0]
    assert torch.equal(output, per_head[:, :, None, None].expand_as(output))
    assert torch.allclose(per_head.sum(dim=1), torch.full((200,), 8.0))
    assert float((per_head == 0).float().mean()) == pytest.approx(0.25, abs=0.04)
    assert float(per_head.mean()) == pytest.approx(1.0)


def test_one_head_stays_at_least() -> None:
    output = head_dropout(0.999, seed=0)(0, torch.ones(50, 4, 1, 1))
    assert ((output != 0).sum(dim=1) >= 1).all()


def test_what_is_left_out_depends_on_seed_and_layer_alone() -> None:
    attended = torch.ones(20, 8, 1, 1)
    first = head_dropout(0.5, seed=1)(0, attended)
    torch.manual_seed(3)
    assert torch.equal(first, head_dropout(0.5, seed=1)(0, attended))
    assert not torch.equal(first, head_dropout(0.5, seed=1)(1, attended))
    assert not torch.equal(first, head_dropout(0.5, seed=2)(0, attended))


def test_the_cosine_is_that_of_all_pairs() -> None:
    attended = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    pairs = [
        torch.cosine_similarity(attended[:, a], attended[:, b], dim=-1)
        for a in range(5)
        for b in range(5)
    ]
    expected = torch.stack(pairs).mean()
    assert float(mean_cosine(attended)) == pytest.approx(float(expected), rel=1e-6)
    similarity = HeadSimilarity()
    assert similarity(0, attended) is attended
    similarity(1, torch.ones(1, 2, 1, 4))
    assert float(similarity.mean) == pytest.approx((float(expected) + 1) / 2, rel=1e-6)


def test_the_term_pulls_heads_apart() -> None:
    model = random_model(tiny.llama(), seed=0).requires_grad_(True)
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    means = []
    for _ in range(10):
        similarity = HeadSimilarity()
        model.forward_dense(ids, edit=similarity)
        means.append(float(similarity.mean.detach()))
        optimizer.zero_grad()
        similarity.mean.backward()
        optimizer.step()
    assert means[-1] < means[0] - 0.01


def test_a_temperature_becomes_part_of_the_weights() -> None:
    config = tiny.llama()
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([0.5, 1.0, 2.0, 3.0])
    at_run_time = tuple(
        HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 8), temperature=tuple(factors.tolist()))
        for _ in config.layers
    )
    expected = random_model(config.replace(layers=at_run_time), seed=0).logits(ids)
    model = random_model(config, seed=0)
    names = set(model.state_dict())
    with head_temperatures(model), torch.no_grad():
        learned = [p for name, p in model.named_parameters() if name.endswith("logarithm")]
        assert len(learned) == config.num_layers
        for parameter in learned:
            parameter.copy_(factors.log())
        assert (model.logits(ids) - expected).abs().max() <= 1e-5
    assert (model.logits(ids) - expected).abs().max() <= 1e-5
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"layers": (HeadConfig(4, 2, 8, qk_norm=QKNorm("rms_norm", "head", 1e-6)),) * 2},
    ],
)
def test_temperatures_are_refused_where_they_cannot_become_weights(
    changes: dict[str, object],
) -> None:
    model = random_model(tiny.llama(**changes), seed=0)
    names = set(model.state_dict())
    with pytest.raises(ConfigError, match="head_temperature is True"), head_temperatures(model):
        pass
    assert set(model.state_dict()) == names
