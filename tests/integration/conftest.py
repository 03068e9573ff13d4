"""A checkpoint whose generations are long enough to be interrupted."""

from pathlib import Path

import pytest

from tests import checkpoints


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = checkpoints.llama(max_position_embeddings=4096)
    return checkpoints.save(model, tmp_path_factory.mktemp("model") / "tiny-gqa")
