"""Bits per byte are those of the text, and compressors see the same text."""

import lzma
import math
import random

import pytest
import torch
from tokenizers import Tokenizer

from models.config import ModelConfig
from models.train.evaluate import (
    bits_per_byte,
    compressors_bits_per_byte,
    validation_loss,
    validation_rows,
    xz_after_training_text,
)
from models.train.tokenizer import BOS, train_tokenizer
from models.transformer import random_model
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 290)


def config_for(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    return tiny.llama(vocab_size=tokenizer.get_vocab_size()).replace(**changes)


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
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    nats = 0.0
    for index, token in enumerate(ids):
        start = index // (window - 1) * (window - 1)
        logits = model.logits(torch.tensor([[BOS, *ids[start:index]]]))[0, -1]
        nats -= float(logits.double().log_softmax(dim=-1)[token])
    expected = nats / math.log(2) / len(text.encode())
    assert bits_per_byte(model, tokenizer, [text]) == pytest.approx(expected, rel=1e-5)


def test_validation_loss_is_the_mean_over_rows(tokenizer: Tokenizer) -> None:
    model = random_model(config_for(tokenizer), seed=0)
    tokens = torch.tensor(tokenizer.encode(TEXT).ids, dtype=torch.int32)
    rows = validation_rows(tokens, num_rows=11, seq_len=16)
    assert rows.shape == (11, 16)
    assert (rows[:, 0] == BOS).all()
    assert torch.equal(rows[3, 1:], tokens[3 * (len(tokens) // 11) :][1:16].long())
    losses = -model.logits(rows[:, :-1]).log_softmax(dim=-1).gather(2, rows[:, 1:, None])
    assert validation_loss(model, rows) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_fewer_rows_where_the_text_is_short() -> None:
    assert validation_rows(torch.arange(40, dtype=torch.int32), 11, 16).shape == (2, 16)


def test_compressors_see_the_files_behind_one_another() -> None:
    texts = ["abc — " * 50, "def" * 50]
    data = "".join(texts).encode()
    bits = compressors_bits_per_byte(texts)
    assert set(bits) == {"gzip", "bzip2", "xz"}
    assert bits["xz"] == 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert all(0 < value < 8 for value in bits.values())


def test_xz_remembers_the_training_text() -> None:
    draw = random.Random(0)
    held_out = "".join(draw.choices("abcdefghij", k=4000))
    other = "".join(draw.choices("abcdefghij", k=4000))
    alone = compressors_bits_per_byte([held_out])["xz"]
    assert xz_after_training_text([other, held_out, other], [held_out]) < 0.1 * alone
    assert xz_after_training_text([other], [held_out]) == pytest.approx(alone, rel=0.1)
