"""A tiny checkpoint and a server of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import checkpoints
from tests.serving import RunningServer, running_server


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.llama(), tmp_path_factory.mktemp("model") / "tiny-gqa")


@pytest.fixture
async def server(model_path: Path) -> AsyncIterator[RunningServer]:
    async with running_server(model_path) as running:
        yield running
