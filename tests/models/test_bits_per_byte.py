"""Bits per byte are those of the text, by transformers too, whatever the tokenizer begins with."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from models.bits_per_byte import bits_per_byte
from models.checkpoints.writer import save_model
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.train.tokenizer import BOS, train_tokenizer
from models.transformer import random_model
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 12


@pytest.fixture(scope="module")
def backend() -> Backend:
    return train_tokenizer([TEXT], 290)


def config_for(backend: Backend, **changes: object) -> ModelConfig:
    return tiny.llama(vocab_size=backend.get_vocab_size()).replace(**changes)


@pytest.mark.parametrize("begin", ["<bos>", "<bos> <pad>", ""])
def test_transformers_computes_the_same(begin: str, backend: Backend, tmp_path: Path) -> None:
    backend = Backend.from_str(backend.to_str())
    special_tokens = [(token, backend.token_to_id(token)) for token in begin.split()]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A".strip(), special_tokens=special_tokens
    )
    model = random_model(config_for(backend, max_position_embeddings=32), seed=0)
    save_model(model, tmp_path)
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    texts = [TEXT[:400], "größer", "—", ""]
    prefix = [token_id for _, token_id in special_tokens]
    nats = 0.0
    for text in texts:
        ids = backend.encode(text, add_special_tokens=False).ids
        width = 32 - len(prefix)
        for start in range(0, len(ids), width):
            row = torch.tensor([prefix + ids[start : start + width]])
            labels = row.clone()
            labels[0, : len(prefix)] = -100
            count = int((labels[0, 1:] != -100).sum())
            if count:
                nats += count * float(theirs(row, labels=labels).loss.detach())
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    scored: list[float] = []
    found = bits_per_byte(model, Tokenizer(backend), texts, on_bytes=scored.append)
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(scored) == pytest.approx(sum(len(text.encode()) for text in texts))


def test_a_model_that_knows_nothing_needs_the_whole_alphabet(backend: Backend) -> None:
    config = config_for(backend)
    model = random_model(config, seed=0)
    assert model.lm_head is not None
    torch.nn.init.zeros_(model.lm_head.weight)
    texts = ["größer", TEXT, "—"]
    assert len(backend.encode(TEXT).ids) > 2 * config.max_position_embeddings
    num_predicted = sum(len(backend.encode(text).ids) - 1 for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    expected = num_predicted * math.log2(backend.get_vocab_size()) / num_bytes
    assert bits_per_byte(model, Tokenizer(backend), texts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("window", [7, 16, 64])
def test_each_token_is_scored_once_in_its_window(backend: Backend, window: int) -> None:
    model = random_model(config_for(backend, max_position_embeddings=window), seed=0)
    text = TEXT[:150]
    ids = backend.encode(text, add_special_tokens=False).ids
    nats = 0.0
    for index, token in enumerate(ids):
        start = index // (window - 1) * (window - 1)
        logits = model.logits(torch.tensor([[BOS, *ids[start:index]]]))[0, -1]
        nats -= float(logits.double().log_softmax(dim=-1)[token])
    expected = nats / math.log(2) / len(text.encode())
    assert bits_per_byte(model, Tokenizer(backend), [text]) == pytest.approx(expected, rel=1e-5)
