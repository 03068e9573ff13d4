"""The devices of replicas under Ray; asked without Ray."""

import torch

from service.config import ServiceConfig
from service.engine.memory import resolve_device


def check_devices(config: ServiceConfig) -> None:
    """Refuse what the replicas' devices cannot be.

    Raises:
        ValueError: a single GPU is named, or there are more replicas than GPUs.
    """
    if config.engine.device.startswith("cuda:"):
        raise ValueError(
            f"engine.device is {config.engine.device!r}; allowed with Ray: auto, cpu, cuda: Ray "
            "gives each replica a GPU of its own"
        )
    own = config.ray_address is None
    if own and device_of(config) == "cuda" and config.num_replicas > torch.cuda.device_count():
        raise ValueError(
            f"replicas is {config.replicas}, of {len(config.applications)} applications; allowed: "
            f"at most {torch.cuda.device_count()} in all, one per GPU of this machine"
        )


def device_of(config: ServiceConfig) -> str:
    """Of the replicas; only `auto` depends on where this is asked, which may be a node without."""
    device = config.engine.device
    return resolve_device(device).type if device == "auto" else device
