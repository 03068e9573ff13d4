"""From a configuration to a loaded model, and from memory to a number of KV blocks."""

import os
from pathlib import Path

import torch

from models.checkpoints.loader import load_model
from models.config import ITEMSIZE
from models.transformer import Transformer
from service.engine.config import EngineConfig

# What of the free memory the KV cache may take when nothing else is said: on a GPU nearly all,
# on a CPU a part, because the machine has other work.
_GPU_SHARE = 0.85
_CPU_SHARE = 0.25


def load_configured_model(path: str | Path, config: EngineConfig) -> Transformer:
    """The model of a directory, on the device and in the type that the engine is to use."""
    return load_model(
        path,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        device=resolve_device(config.device),
        kernel=config.kernel,
    )


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return device


def block_bytes(model: Transformer, block_size: int) -> int:
    """Bytes of one KV block over all layers."""
    width = model.config.kv_bytes_per_token("float32") // ITEMSIZE["float32"]
    return width * model.dtype.itemsize * block_size


def num_blocks_for(model: Transformer, config: EngineConfig, max_model_len: int) -> int:
    """Blocks of the KV cache: as configured, else what the sequences can use and memory holds.

    Raises:
        ValueError: the memory does not hold a single block.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    per_block = block_bytes(model, config.block_size)
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    if config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // per_block
    else:
        num_blocks = min(useful, _memory_share(model.device) // per_block)
    if num_blocks < 1:
        raise ValueError(
            f"kv_cache_bytes is {config.kv_cache_bytes}; one block of {config.block_size} tokens "
            f"takes {per_block} bytes"
        )
    return num_blocks


def _memory_share(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_SHARE)
