"""What Ray cannot give to replicas is refused before it is started."""

import pytest
import torch

from service.config import ServiceConfig
from service.engine import EngineConfig
from service.runtimes.devices import check_devices


def _config(device: str, **settings: object) -> ServiceConfig:
    return ServiceConfig(engine=EngineConfig(device=device), **settings)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_single_gpu_cannot_be_named() -> None:
    with pytest.raises(ValueError, match="'cuda:1'; allowed with Ray: auto, cpu, cuda"):
        check_devices(_config("cuda:1"))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_there_are_no_more_replicas_than_gpus(device: str) -> None:
    check_devices(_config(device, replicas=2))
    check_devices(_config("cpu", replicas=3))
    check_devices(_config(device, replicas=3, ray_address="10.0.0.1:6379"))
    with pytest.raises(ValueError, match="replicas is 3, of 1 applications; allowed: at most 2"):
        check_devices(_config(device, replicas=3))
    with pytest.raises(ValueError, match="replicas is 2, of 2 applications; allowed: at most 2"):
        check_devices(_config(device, replicas=2, model={"a": "demo", "b": "demo"}))
