"""The engine alone, without any front: tokens per second, step times, and the byte floor beside.

A decode step has to read every weight and every cached key and value once, so
`(weight bytes + KV bytes) / memory bandwidth` is the least time it can take while it is
bandwidth-bound. Prefill is bound by arithmetic instead: about `2 · parameters` operations a token.
"""

import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.config import DTypeName, HeadConfig, KVCacheDType, ModelConfig
from models.cpu.linear import WeightDType
from models.kernels import KernelName
from models.positions import RopeConfig
from models.transformer import random_model
from service.capacity.machine import copy_bandwidth
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.memory import load_configured_model, resolve_device
from service.engine.sampling_params import SamplingParams
from service.engine.stats import StepStats


@dataclass(frozen=True, slots=True)
class BenchShape:
    """A Llama-style model of random weights."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: DTypeName
    window: int | None = None

    def model_config(self, max_position_embeddings: int) -> ModelConfig:
        rope = RopeConfig(theta=10_000.0, rotary_dim=self.head_dim)
        heads = HeadConfig(self.heads, self.kv_heads, self.head_dim, rope=rope, window=self.window)
        return ModelConfig(
            family="llama",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            layers=(heads,) * self.layers,
            max_position_embeddings=max_position_embeddings,
            norm="rms_norm",
            norm_eps=1e-5,
            activation="silu",
            gated_mlp=True,
            qkv_bias=False,
            output_bias=False,
            mlp_bias=False,
            tie_word_embeddings=True,
            dtype=self.dtype,
            name=f"random-{self.layers}x{self.hidden}",
        )


@dataclass(frozen=True, slots=True)
class BenchWorkload:
    """Requests that start together: `clients` prompts of `prompt` tokens, `output` tokens each."""

    clients: int
    prompt: int
    output: int
    repeats: int
    seed: int


def run_bench(
    shapes: list[BenchShape],
    workload: BenchWorkload,
    *,
    device: str,
    kernel: KernelName,
    weight_dtypes: list[WeightDType],
    kv_cache_dtypes: list[KVCacheDType],
    path: Path | None,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure each shape (or the checkpoint in `path`) with weights, keys and values of each type;
    repeats are interleaved.

    Args:
        on_run: told how many runs of how many are done.

    Returns:
        A JSON document: machine, workload, and for each shape medians over the repeats.

    Raises:
        ModelError, ValueError: a shape, the checkpoint or the device cannot be used.
    """
    configs = [
        _engine_config(workload, device, kernel, *dtypes)
        for dtypes in itertools.product(weight_dtypes, kv_cache_dtypes)
    ]
    engines = (
        [Engine(load_configured_model(path, config), config) for config in configs]
        if path is not None
        else [_random_engine(shape, workload, config) for shape in shapes for config in configs]
    )
    num_runs = len(engines) * (workload.repeats + 1)
    done = itertools.count(1)
    for engine in engines:
        _measure(engine, workload)  # warm-up
        on_run(next(done), num_runs)
    bandwidth = copy_bandwidth(resolve_device(device))
    runs: list[list[_Run]] = [[] for _ in engines]
    for _ in range(workload.repeats):
        for engine, collected in zip(engines, runs, strict=True):
            collected.append(_measure(engine, workload))
            on_run(next(done), num_runs)
    return {
        "bench": "engine",
        "machine": machine(resolve_device(device)),
        "workload": asdict(workload),
        "copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 2),
        "runs": [
            _summary(engine, collected, workload, bandwidth)
            for engine, collected in zip(engines, runs, strict=True)
        ],
    }


def machine(device: torch.device) -> dict[str, str | int]:
    """What a result has to be read with."""
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@dataclass(frozen=True, slots=True)
class _Run:
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    total_tokens_per_s: float
    decode_steps: list[float]
    kv_bytes_peak: int


def _measure(engine: Engine, workload: BenchWorkload) -> _Run:
    rng = random.Random(workload.seed)  # noqa: S311, a workload is no secret
    steps: list[StepStats] = []
    engine.on_step = steps.append
    params = SamplingParams(max_tokens=workload.output, temperature=0, ignore_eos=True)
    vocab_size = engine.model_config.vocab_size
    started = time.perf_counter()
    for _ in range(workload.clients):
        prompt = [rng.randrange(vocab_size) for _ in range(workload.prompt)]
        engine.add(EngineRequest(prompt, params))
    while engine.has_unfinished:
        engine.step()
    seconds = time.perf_counter() - started
    # A step of decodes only has one token per sequence.
    decodes = [step for step in steps if step.num_tokens == step.num_sequences]
    prefills = [step for step in steps if step.num_tokens > step.num_sequences]
    return _Run(
        prefill_tokens_per_s=sum(s.num_tokens for s in prefills) / sum(s.seconds for s in prefills),
        decode_tokens_per_s=sum(s.num_tokens for s in decodes) / sum(s.seconds for s in decodes),
        total_tokens_per_s=workload.clients * workload.output / seconds,
        decode_steps=[step.seconds for step in decodes],
        kv_bytes_peak=max(step.load.kv_blocks_used for step in steps) * _page_bytes(engine),
    )


def _summary(
    engine: Engine, runs: list[_Run], workload: BenchWorkload, bandwidth: float
) -> dict[str, Any]:
    model = engine.model_runner.model
    steps_ms = sorted(1000 * seconds for run in runs for seconds in run.decode_steps)
    weight_bytes = model.step_bytes
    mean_context = workload.prompt + workload.output // 2
    kv_bytes = workload.clients * engine.served_config.kv_bytes(mean_context)
    floor_ms = 1000 * (weight_bytes + kv_bytes) / bandwidth
    percentiles = statistics.quantiles(steps_ms, n=100)
    return {
        "heads": model.config.head_label,
        "attention": "+".join(dict.fromkeys(heads.kind for heads in model.config.layers)),
        "parameters": model.num_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_dtype": engine.config.weight_dtype,
        "kv_cache_dtype": engine.config.kv_cache_dtype,
        "kernel": model.kernel_name,
        "kv_bytes_per_token": engine.kv_bytes_per_token,
        "kv_bytes_peak": max(run.kv_bytes_peak for run in runs),
        "prefill_tokens_per_s": _median(run.prefill_tokens_per_s for run in runs),
        "decode_tokens_per_s": _median(run.decode_tokens_per_s for run in runs),
        "total_tokens_per_s": _median(run.total_tokens_per_s for run in runs),
        "total_tokens_per_s_range": [
            round(limit([run.total_tokens_per_s for run in runs]), 1) for limit in (min, max)
        ],
        "decode_step_ms": {
            "p50": round(percentiles[49], 3),
            "p90": round(percentiles[89], 3),
            "p99": round(percentiles[98], 3),
        },
        "floor": {
            "weight_bytes": weight_bytes,
            "kv_bytes": kv_bytes,
            "step_ms": round(floor_ms, 3),
            "reached": round(floor_ms / percentiles[49], 3),
        },
    }


def _page_bytes(engine: Engine) -> int:
    return engine.kv_cache.nbytes // engine.kv_cache.num_pages


def _random_engine(shape: BenchShape, workload: BenchWorkload, config: EngineConfig) -> Engine:
    model = random_model(
        shape.model_config(workload.prompt + workload.output),
        seed=workload.seed,
        dtype=getattr(torch, shape.dtype),
        device=resolve_device(config.device),
        kernel=config.kernel,
    )
    return Engine(model, config)


def _engine_config(
    workload: BenchWorkload,
    device: str,
    kernel: KernelName,
    weight_dtype: WeightDType,
    kv_cache_dtype: KVCacheDType,
) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=workload.clients,
        max_num_batched_tokens=max(512, workload.clients),
        max_waiting_requests=workload.clients,
        max_waiting_tokens=workload.clients * workload.prompt,
        max_model_len=workload.prompt + workload.output,
        device=device,
        kernel=kernel,
        weight_dtype=weight_dtype,
        kv_cache_dtype=kv_cache_dtype,
    )


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 1)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
