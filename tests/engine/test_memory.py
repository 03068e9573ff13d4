"""Devices by name, and blocks by memory: the plan equals what is really allocated."""

import os
from pathlib import Path

import pytest
import torch

from models.config import HeadConfig
from models.gpu.decode_graphs import memory_bytes
from models.kernels import KernelName
from models.kv_cache import KVCache
from models.transformer import Transformer, random_model
from service.engine import memory
from service.engine.config import EngineConfig
from service.engine.memory import (
    load_configured_model,
    num_blocks_for,
    resolve_device,
)
from tests import checkpoints
from tests.engine.tiny import CONFIG, tiny_model
from tests.models.kernels import KERNELS

# Two layers of two key/value heads and one, eight wide, keys and values, four bytes each.
BYTES_PER_TOKEN = (2 + 1) * 8 * 2 * 4


@pytest.mark.parametrize(("available", "expected"), [(False, "cpu"), (True, "cuda")])
def test_auto_is_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, available: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize(("name", "count"), [("cpu", 0), ("cuda", 1), ("cuda:0", 1), ("cuda:1", 2)])
def test_a_device_that_is_there_is_taken(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_not_there_is_refused_with_the_number_that_is(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"device is '{name}'; this machine has {count} CUDA"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "meta", "mps"])
def test_other_names_are_refused_with_those_that_are_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{name}'; allowed: auto, cpu, cuda, cuda:N"):
        resolve_device(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(
    "layers", [CONFIG.layers, (HeadConfig(8, 8, 4),), (HeadConfig(2, 1, 6), HeadConfig(4, 4, 8))]
)
def test_a_planned_block_is_as_large_as_an_allocated_one(
    dtype: torch.dtype, block_size: int, layers: tuple[HeadConfig, ...]
) -> None:
    model = random_model(CONFIG.replace(layers=layers), seed=1, dtype=dtype)
    cache = KVCache(
        model.config, num_pages=3, block_size=block_size, dtype=dtype, device=model.device
    )
    config = EngineConfig(block_size=block_size, kv_cache_bytes=cache.nbytes)
    assert num_blocks_for(model, config, 100) == 3
    too_little = EngineConfig(block_size=block_size, kv_cache_bytes=cache.nbytes // 3 - 1)
    with pytest.raises(ValueError, match=f"takes {cache.nbytes // 3} bytes"):
        num_blocks_for(model, too_little, 100)


def test_a_configured_number_of_blocks_is_taken_as_it_is() -> None:
    config = EngineConfig(num_blocks=5, kv_cache_bytes=1)
    assert num_blocks_for(tiny_model(), config, 100) == 5


@pytest.mark.parametrize(("spare", "expected"), [(0, 9), (-1, 8), (4 * BYTES_PER_TOKEN - 1, 9)])
def test_bytes_are_divided_into_whole_blocks(spare: int, expected: int) -> None:
    config = EngineConfig(block_size=4, kv_cache_bytes=9 * 4 * BYTES_PER_TOKEN + spare)
    assert num_blocks_for(tiny_model(), config, 100) == expected


def test_memory_for_less_than_a_block_is_refused() -> None:
    config = EngineConfig(block_size=4, kv_cache_bytes=4 * BYTES_PER_TOKEN - 1)
    with pytest.raises(ValueError, match=f"kv_cache_bytes is .* takes {4 * BYTES_PER_TOKEN} bytes"):
        num_blocks_for(tiny_model(), config, 100)


def free_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: num_bytes)


@pytest.mark.parametrize(("max_model_len", "blocks_each"), [(100, 7), (96, 6), (1, 1)])
def test_no_more_blocks_are_taken_than_all_sequences_can_fill(
    monkeypatch: pytest.MonkeyPatch, max_model_len: int, blocks_each: int
) -> None:
    free_memory(monkeypatch, 2**40)
    config = EngineConfig(max_num_seqs=3)
    assert num_blocks_for(tiny_model(), config, max_model_len) == 3 * blocks_each


def test_blocks_take_a_part_of_the_free_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 400 * 16 * BYTES_PER_TOKEN)
    num_blocks = num_blocks_for(tiny_model(), EngineConfig(max_num_seqs=64), 1000)
    assert 0 < num_blocks <= 200


def test_on_a_gpu_recorded_steps_have_their_memory_beside_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(Transformer, "device", property(lambda self: gpu))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2 * 10**9))
    model = tiny_model()
    all_of_it, the_rest = (
        num_blocks_for(
            model,
            EngineConfig(max_num_seqs=512, block_size=4, cuda_graphs=graphs),
            10**4,
        )
        for graphs in (False, True)
    )
    per_block = 4 * BYTES_PER_TOKEN
    assert all_of_it == int(0.85 * 10**9) // per_block
    recorded = memory_bytes(model, max_num_seqs=512, max_length=10**4)
    assert the_rest == (int(0.85 * 10**9) - recorded) // per_block


def test_no_free_memory_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 0)
    with pytest.raises(ValueError, match="holds no KV block of"):
        num_blocks_for(tiny_model(), EngineConfig(), 100)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_checkpoint_is_loaded_as_configured(tmp_path: Path, kernel: KernelName) -> None:
    path = checkpoints.save(checkpoints.llama(), tmp_path)
    config = EngineConfig(dtype="bfloat16", device="cpu", kernel=kernel)
    model = load_configured_model(path, config)
    assert model.dtype is torch.bfloat16
    assert model.device == torch.device("cpu")
    assert model.kernel_name == kernel


def test_the_type_of_a_checkpoint_is_kept_unless_another_is_configured(tmp_path: Path) -> None:
    path = checkpoints.save(checkpoints.llama().to(torch.float16), tmp_path)
    assert load_configured_model(path, EngineConfig(device="cpu")).dtype is torch.float16


def test_free_memory_is_what_can_be_had_and_not_more_than_there_is() -> None:
    available = memory.available_memory()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available <= total
