"""Losses are means over rows, and compressors see the same text."""

import lzma
import random

import pytest
import torch
from tokenizers import Tokenizer

from models.train.evaluate import (
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


def test_validation_loss_is_the_mean_over_rows(tokenizer: Tokenizer) -> None:
    model = random_model(tiny.llama(vocab_size=tokenizer.get_vocab_size()), seed=0)
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
