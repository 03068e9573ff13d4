"""Training learns, is decided by its seed, and is measured in bits per byte of text."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.config import ModelConfig
from models.train.corpus import train_tokenizer
from models.train.trainer import (
    TrainConfig,
    TrainProgress,
    bits_per_byte,
    encode_documents,
    train,
)
from models.transformer import Transformer, random_model
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 290)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> Tensor:
    return encode_documents(tokenizer, [TEXT, TEXT, TEXT])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes by one second per look, so that a training has a fixed number of steps."""
    now = itertools.count()
    monkeypatch.setattr(
        "models.train.trainer.time", SimpleNamespace(monotonic=lambda: float(next(now)))
    )


def config_for(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    return tiny.llama(vocab_size=tokenizer.get_vocab_size()).replace(**changes)


def learn(
    model: Transformer, tokens: Tensor, config: TrainConfig
) -> tuple[int, list[TrainProgress]]:
    progress: list[TrainProgress] = []
    return train(model, tokens, config, progress.append), progress


QUICK = TrainConfig(max_seconds=80, batch_tokens=128, seq_len=16, final_seq_len=32)


def test_documents_lie_behind_one_another(tokenizer: Tokenizer) -> None:
    first, second = "the cat", "größer"
    expected = [*tokenizer.encode(first).ids, 1, *tokenizer.encode(second).ids, 1]
    ids = encode_documents(tokenizer, [first, second])
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected
    assert ids.tolist().count(0) == ids.tolist().count(1) == 2


@pytest.mark.usefixtures("clock")
def test_training_lowers_the_loss_and_the_bits(tokenizer: Tokenizer, tokens: Tensor) -> None:
    model = random_model(config_for(tokenizer), seed=0)
    before = bits_per_byte(model, tokenizer, [TEXT])
    _, progress = learn(
        model, tokens, TrainConfig(200, batch_tokens=128, seq_len=16, final_seq_len=32)
    )
    assert progress[0].loss == pytest.approx(math.log(tokenizer.get_vocab_size()), rel=0.2)
    assert progress[-1].loss < 0.2 * progress[0].loss
    assert bits_per_byte(model, tokenizer, [TEXT]) < 0.2 * before
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.usefixtures("clock")
def test_progress_counts_steps_and_time(tokenizer: Tokenizer, tokens: Tensor) -> None:
    seen, progress = learn(random_model(config_for(tokenizer), seed=0), tokens, QUICK)
    # Two looks at the clock per step: one for the share, one for the rate.
    assert [point.step for point in progress] == list(range(1, 41))
    assert [point.share for point in progress] == pytest.approx(
        [(2 * step + 1) / 80 for step in range(40)]
    )
    assert seen == 40 * 128
    assert progress[-1].tokens_per_second == pytest.approx(seen / 80)


@pytest.mark.usefixtures("clock")
def test_rows_are_longer_at_the_end(
    tokenizer: Tokenizer, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = Transformer.forward_dense

    def record(self: Transformer, input_ids: Tensor) -> Tensor:
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids)

    monkeypatch.setattr(Transformer, "forward_dense", record)
    learn(random_model(config_for(tokenizer), seed=0), tokens, QUICK)
    assert shapes == [(8, 16)] * 32 + [(4, 32)] * 8


@pytest.mark.usefixtures("clock")
def test_the_seed_decides_the_result(tokenizer: Tokenizer, tokens: Tensor) -> None:
    def result(seed: int, global_seed: int) -> dict[str, Tensor]:
        torch.manual_seed(global_seed)
        model = random_model(config_for(tokenizer), seed=0)
        config = TrainConfig(12, batch_tokens=64, seq_len=16, final_seq_len=16, seed=seed)
        learn(model, tokens, config)
        return model.state_dict()

    first, again, other = result(1, 10), result(1, 20), result(2, 10)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])


@pytest.mark.usefixtures("clock")
def test_every_parameter_is_trained(tokenizer: Tokenizer, tokens: Tensor) -> None:
    config = config_for(tokenizer, qkv_bias=True, output_bias=True, mlp_bias=True)
    model = random_model(config, seed=0)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    learn(model, tokens, QUICK)
    after = model.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert all(parameter.isfinite().all() for parameter in after.values())


@pytest.mark.usefixtures("clock")
def test_the_rate_warms_up_and_ends_at_a_tenth(
    tokenizer: Tokenizer, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[1]["lr"] == rates[-1]
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    config = TrainConfig(
        200, batch_tokens=16, seq_len=16, final_seq_len=16, learning_rate=1e-2, warmup_share=0.1
    )
    learn(random_model(config_for(tokenizer), seed=0), tokens, config)
    highest = rates.index(max(rates))
    assert rates[0] == pytest.approx(1e-2 * (1 / 200) / 0.1)
    assert rates[:highest] == sorted(rates[:highest])
    assert highest == 10
    assert max(rates) == pytest.approx(1e-2, rel=1e-3)
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3, rel=1e-2)


# --- bits per byte -----------------------------------------------------------------------------


def test_a_model_that_knows_nothing_needs_the_whole_alphabet(tokenizer: Tokenizer) -> None:
    config = config_for(tokenizer)
    model = random_model(config, seed=0)
    assert model.lm_head is not None
    torch.nn.init.zeros_(model.lm_head.weight)
    texts = ["größer", TEXT, "—"]
    assert len(tokenizer.encode(TEXT).ids) > 2 * config.max_position_embeddings
    num_predicted = sum(len(tokenizer.encode(text).ids) - 1 for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    expected = num_predicted * math.log2(tokenizer.get_vocab_size()) / num_bytes
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("window", [7, 16, 64])
def test_each_token_is_scored_once_in_its_window(tokenizer: Tokenizer, window: int) -> None:
    model = random_model(config_for(tokenizer, max_position_embeddings=window), seed=0)
    text = TEXT[:150]
    ids = tokenizer.encode(text).ids
    nats = 0.0
    for index in range(1, len(ids)):
        start = (index - 1) // (window - 1) * (window - 1)
        logits = model.logits(torch.tensor([ids[start:index]]))[0, -1]
        nats -= float(logits.double().log_softmax(dim=-1)[ids[index]])
    expected = nats / math.log(2) / len(text.encode())
    assert bits_per_byte(model, tokenizer, [text]) == pytest.approx(expected, rel=1e-5)
