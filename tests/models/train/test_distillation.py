"""The divergence from a teacher is what its formula says, of tokens that count."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from models.train.config import TrainConfig
from models.train.distillation import check_teacher, divergence, teach
from models.train.rows import IGNORED
from tests.models import tiny

CONFIG = TrainConfig(256, batch_tokens=64, seq_len=16, final_seq_len=32, distillation=0.5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), size=st.floats(0.1, 30), vocab=st.integers(2, 40))
def test_it_is_the_formula_in_numpy(seed: int, size: float, vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = size * torch.randn(2, 3, 7, vocab, generator=generator)
    targets = torch.randint(vocab, (3, 7), generator=generator)
    targets[:, ::3] = IGNORED
    found = float(divergence(teacher, student, targets))
    known = targets.numpy() != IGNORED
    p, q = (
        np.exp(x - x.max(axis=-1, keepdims=True))
        for x in (teacher.double().numpy(), student.double().numpy())
    )
    p, q = (x / x.sum(axis=-1, keepdims=True) for x in (p, q))
    expected = (p * (np.log(p) - np.log(q))).sum(axis=-1)[known].mean()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(2, 5, 30)
    assert float(divergence(logits, logits, torch.zeros(2, 5, dtype=torch.int64))) == 0


def test_a_teacher_is_not_trained() -> None:
    model = tiny.model(tiny.llama()).requires_grad_(True)
    ids = torch.arange(12).view(2, 6)
    logits = teach(model, ids)
    assert not logits.requires_grad
    assert torch.equal(logits, model.logits(ids))


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    model = tiny.model(tiny.llama())
    plain = dataclasses.replace(CONFIG, distillation=0.0)
    check_teacher(model, model, CONFIG)
    check_teacher(None, model, plain)
    for teacher, config in ((None, CONFIG), (model, plain)):
        with pytest.raises(ConfigError, match="above 0 with a teacher, 0 without one"):
            check_teacher(teacher, model, config)
    other = tiny.model(tiny.llama(vocab_size=60))
    with pytest.raises(ConfigError, match="vocab_size of the teacher is 60; allowed: 61, those of"):
        check_teacher(other, model, CONFIG)
    short = tiny.model(tiny.llama(max_position_embeddings=31))
    with pytest.raises(ConfigError, match="of the teacher is 31; allowed: 32 or more"):
        check_teacher(short, model, CONFIG)
    with pytest.raises(ConfigError, match=r"distillation is 1\.5; allowed: 0 to 1"):
        dataclasses.replace(CONFIG, distillation=1.5)
