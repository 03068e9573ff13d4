"""What is said of two models is what their distributions say."""

import pytest
import torch

from models.heads.fidelity import compare
from models.transformer import random_model
from tests.models import tiny


def test_sums_over_all_tokens() -> None:
    one, other = (random_model(tiny.llama(), seed=seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(61, shape, generator=generator) for shape in ((2, 9), (1, 5))]
    logs = [
        torch.cat([m.logits(ids[:, :-1]).flatten(0, 1) for ids in batches]).double().log_softmax(-1)
        for m in (one, other)
    ]
    targets = torch.cat([ids[:, 1:].flatten() for ids in batches])
    found = compare(one, other, batches)
    assert found.original_loss == pytest.approx(
        float(-logs[0][range(20), targets].mean()), rel=1e-5
    )
    assert found.changed_loss == pytest.approx(float(-logs[1][range(20), targets].mean()), rel=1e-5)
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    agreement = (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()
    assert found.agreement == pytest.approx(float(agreement))


def test_a_model_is_itself() -> None:
    model = random_model(tiny.llama(), seed=0)
    found = compare(model, model, [torch.arange(10)[None]])
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.original_loss == found.changed_loss
