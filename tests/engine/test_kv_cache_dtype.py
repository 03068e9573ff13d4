"""`kv_cache_dtype: int8`: half the bytes, nearly the same answers, the same on every path."""

import random
import statistics
from pathlib import Path

import pytest
import torch

from models.checkpoints.bundled import BUNDLED_MODELS
from models.config import HeadConfig
from models.errors import ConfigError
from models.kernels import KernelName
from models.transformer import random_model
from service.engine import Engine, EngineConfig
from service.engine.engine import EngineRequest
from service.engine.memory import kernel_for
from service.engine.stats import StepStats
from service.engine.support import check_cache_is_read
from tests.engine.tiny import CONFIG, finish_all, greedy, reason, tiny_engine, tiny_model

DEMO_TEXT = (Path(random.__file__).read_bytes())[:900]


def test_it_holds_what_the_model_says() -> None:
    engine = tiny_engine(num_blocks=7, block_size=16, kv_cache_dtype="int8")
    # Eight numbers and a scale, against eight float32.
    assert engine.kv_bytes_per_token == 2 * (2 + 1) * (8 + 4)
    assert CONFIG.kv_bytes_per_token() == 2 * (2 + 1) * 32
    assert engine.kv_cache.nbytes == 7 * 16 * engine.kv_bytes_per_token
    assert engine.served_config.kv_cache_dtype == "int8"
    assert engine.load.kv_blocks_total == 7


def test_more_blocks_fit_into_the_same_memory() -> None:
    blocks = [
        tiny_engine(num_blocks=None, kv_cache_bytes=100_000, kv_cache_dtype=dtype).load
        for dtype in ("auto", "int8")
    ]
    assert blocks[0].kv_blocks_total == 100_000 // (4 * 192)
    assert blocks[1].kv_blocks_total == 100_000 // (4 * 72)


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_tokens_are_the_same_in_chunks_in_a_crowd_and_after_preemption(
    kernel: KernelName,
) -> None:
    rng = random.Random(1)
    requests = [
        EngineRequest([rng.randrange(60) for _ in range(length)], greedy(25))
        for length in (3, 40, 17, 60)
    ]
    model = tiny_model(kernel=kernel)
    alone = [
        finish_all(tiny_engine(model, kv_cache_dtype="int8"), [request])[0].token_ids
        for request in requests
    ]
    steps: list[StepStats] = []
    crowded = tiny_engine(
        model,
        kv_cache_dtype="int8",
        num_blocks=40,
        max_num_seqs=4,
        max_num_batched_tokens=11,
        on_step=steps.append,
    )
    together = [output.token_ids for output in finish_all(crowded, requests)]
    assert together == alone
    assert sum(step.num_preempted for step in steps) > 0


def test_what_the_demo_model_loses_is_little() -> None:
    """Nats per token of a text that it knows the like of."""
    losses: list[float] = []
    for dtype in ("auto", "int8"):
        config = EngineConfig(num_blocks=64, num_threads=1, kv_cache_dtype=dtype)
        engine = Engine.from_checkpoint(BUNDLED_MODELS["demo"], config)
        (output,) = finish_all(engine, [EngineRequest(list(DEMO_TEXT), None)])
        losses.append(-statistics.fmean(output.prompt_logprobs))
    assert 0 < abs(losses[1] - losses[0]) < 0.005


@pytest.mark.parametrize("kernel", ["auto", "dense"])
def test_a_sequence_that_breaks_leaves_its_blocks_clean(kernel: KernelName) -> None:
    """All blocks are those of the broken one; what gathers whole blocks multiplies them by 0."""
    model = tiny_model(kernel=kernel, broken_token=7)
    engine = tiny_engine(model, num_blocks=4, kv_cache_dtype="int8")
    clean = finish_all(engine, [EngineRequest([1, 2, 3, 4, 5], greedy(5))])[0]
    broken = finish_all(engine, [EngineRequest([*range(20, 34), 7], greedy(1))])[0]
    assert reason(broken).name == "ERROR"
    again = finish_all(engine, [EngineRequest([1, 2, 3, 4, 5], greedy(5))])[0]
    assert reason(again).name == "LENGTH"
    assert again.token_ids == clean.token_ids


def test_a_type_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp8'; allowed: auto, int8"):
        tiny_engine(kv_cache_dtype="fp8")


def test_on_a_gpu_any_kernel_is_one_that_reads_it() -> None:
    gpu = torch.device("cuda")
    assert kernel_for(EngineConfig(kv_cache_dtype="int8"), gpu) == "dense"
    assert kernel_for(EngineConfig(kv_cache_dtype="int8"), torch.device("cpu")) == "auto"
    assert kernel_for(EngineConfig(), gpu) == "auto"
    check_cache_is_read("paged_triton+dense", EngineConfig())
    with pytest.raises(ValueError, match="the kernel paged_triton reads no cache of 8 bits"):
        check_cache_is_read("paged_triton+dense", EngineConfig(kv_cache_dtype="int8"))


def test_where_it_cannot_be_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int8'; allowed: auto.*paged_triton"):
        tiny_engine(kernel="paged_triton", kv_cache_dtype="int8")
    narrow = random_model(CONFIG.replace(layers=(HeadConfig(4, 2, 6),)), seed=0)
    with pytest.raises(ConfigError, match=r"head_dim is 6, no multiple of 4") as caught:
        tiny_engine(narrow, kv_cache_dtype="int8")
    assert caught.value.field == "kv_cache_dtype"
