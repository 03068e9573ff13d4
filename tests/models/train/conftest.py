"""A small text, and a tokenizer of its own."""

import pytest
from tokenizers import Tokenizer
from torch import Tensor

from models.train.tokenizer import encode_documents, train_tokenizer

_TEXT = "the cat sat on the mat; key and lock is alpha.\n" * 60


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([_TEXT], 400)


@pytest.fixture(scope="session")
def tokens(tokenizer: Tokenizer) -> Tensor:
    return encode_documents(tokenizer, [_TEXT])
