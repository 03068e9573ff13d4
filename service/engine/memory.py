"""From a configuration to a loaded model, and from memory to a number of KV blocks."""

import contextlib
import dataclasses
from pathlib import Path

import torch

from models.checkpoints.loader import load_model
from models.config import ModelConfig
from models.gpu.decode_graphs import memory_bytes
from models.kernels import KernelName
from models.kv_layout import KVLayout
from models.transformer import Transformer
from service.engine.config import EngineConfig
from service.engine.group_pool import BlockGroup, pages_for

# What of the free memory the KV cache may take when nothing else is said: on a GPU nearly all,
# on a CPU a part, because the machine has other work.
_GPU_SHARE = 0.85
_CPU_SHARE = 0.25


def load_configured_model(path: str | Path, config: EngineConfig) -> Transformer:
    """The model of a directory, on the device and in the type that the engine is to use."""
    device = resolve_device(config.device)
    return load_model(
        path,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        device=device,
        kernel=kernel_for(config, device),
    )


def kernel_for(config: EngineConfig, device: torch.device) -> KernelName:
    """The kernel that is asked for; on a GPU, one that reads the cache if any will do."""
    if config.kernel == "auto" and config.kv_cache_dtype == "int8" and device.type == "cuda":
        return "dense"
    return config.kernel


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


def check_kv_cache_bytes(model_config: ModelConfig, config: EngineConfig) -> None:
    """Raise ValueError if the configured memory does not hold a single block.

    Args:
        model_config: with the types that the engine uses (see `as_served`).
    """
    groups = block_groups(model_config, config.block_size)
    num_pages = pages_for(groups, config.block_size, 1, config.max_num_batched_tokens)
    needed = num_pages * page_bytes(model_config, config.block_size)
    if config.kv_cache_bytes is not None and config.kv_cache_bytes < needed:
        raise ValueError(
            f"kv_cache_bytes is {config.kv_cache_bytes}; one block of {config.block_size} tokens "
            f"takes {needed} bytes"
        )
    if config.num_blocks is not None and config.num_blocks < num_pages:
        raise ValueError(
            f"num_blocks is {config.num_blocks}; allowed: at least {num_pages}, one for each "
            "group of heads that remembers a different stretch of the past"
        )


def page_bytes(model_config: ModelConfig, block_size: int) -> int:
    """Bytes of the unit that the KV cache hands out (see `models.kv_layout`)."""
    return KVLayout.of(model_config, block_size).page_elements * model_config.kv_itemsize


def served_config(model: Transformer, config: EngineConfig) -> ModelConfig:
    """`as_served` of a loaded model, whatever its checkpoint says of types."""
    dtype = str(model.dtype).removeprefix("torch.")
    return model.config.replace(dtype=dtype, kv_cache_dtype=config.kv_cache_dtype)


def block_groups(model_config: ModelConfig, block_size: int) -> tuple[BlockGroup, ...]:
    """The groups of heads, in the block manager's terms."""
    return tuple(
        BlockGroup(group.retention.window, group.retention.sink_tokens, group.blocks_per_page)
        for group in KVLayout.of(model_config, block_size).groups
    )


def num_blocks_for(model: Transformer, config: EngineConfig, max_model_len: int) -> int:
    """Blocks of the KV cache: as configured, else what the sequences can use and memory holds.

    Raises:
        ValueError: the memory does not hold a single block.
    """
    model_config = served_config(model, config)
    if config.num_blocks is not None:
        check_kv_cache_bytes(model_config, dataclasses.replace(config, kv_cache_bytes=None))
        return config.num_blocks
    check_kv_cache_bytes(model_config, config)
    per_block = page_bytes(model_config, config.block_size)
    groups = block_groups(model_config, config.block_size)
    each = pages_for(groups, config.block_size, max_model_len, config.max_num_batched_tokens)
    useful = config.max_num_seqs * each
    if config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // per_block
    else:
        share = _memory_share(model.device)
        if config.cuda_graphs and model.device.type == "cuda":
            share -= memory_bytes(model, max_num_seqs=config.max_num_seqs, max_length=max_model_len)
        num_blocks = min(useful, max(share, 0) // per_block)
    if num_blocks < len(groups):
        raise ValueError(f"the free memory holds no KV block of {len(groups) * per_block} bytes")
    return num_blocks


def _memory_share(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return int(available_memory() * _CPU_SHARE)


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the limit of a container."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8"))
        available = min(available, max(limit - used, 0))
    return available
