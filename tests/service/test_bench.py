"""The engine benchmark, on shapes so small that only its arithmetic is tested."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import torch

from models.transformer import random_model
from service.bench import BenchShape, BenchWorkload, run_bench

HERE: dict[str, Any] = {
    "device": "cpu",
    "kernel": "auto",
    "weight_dtypes": ["auto"],
    "kv_cache_dtypes": ["auto"],
    "path": None,
}
SHAPES = [BenchShape(1, 32, 48, 4, kv_heads, 8, 64, "float32") for kv_heads in (4, 1)]
WORKLOAD = BenchWorkload(clients=3, prompt=5, output=6, repeats=2, seed=0)


def test_each_shape_is_measured_and_its_floor_is_the_bytes_it_reads() -> None:
    document = run_bench(
        SHAPES,
        WORKLOAD,
        **HERE,
    )
    assert [run["heads"] for run in document["runs"]] == ["h4kv4d8", "h4kv1d8"]
    for shape, run in zip(SHAPES, document["runs"], strict=True):
        model = random_model(shape.model_config(11), seed=0)
        assert run["kv_bytes_per_token"] == 2 * shape.kv_heads * shape.head_dim * 4
        assert run["floor"]["weight_bytes"] == 4 * model.num_parameters
        # A decode reads, on average, the prompt and half of the output.
        assert run["floor"]["kv_bytes"] == 3 * (5 + 3) * run["kv_bytes_per_token"]
        assert run["decode_step_ms"]["p50"] <= run["decode_step_ms"]["p99"]
        assert min(run["prefill_tokens_per_s"], run["decode_tokens_per_s"]) > 0
    assert document["machine"]["torch"] == torch.__version__


def test_a_window_bounds_what_a_decode_reads_and_what_is_held() -> None:
    whole = BenchShape(1, 32, 48, 4, 2, 8, 64, "float32")
    windowed = dataclasses.replace(whole, window=4)
    workload = BenchWorkload(clients=2, prompt=64, output=64, repeats=1, seed=0)
    document = run_bench(
        [whole, windowed],
        workload,
        **HERE,
    )
    every, some = document["runs"]
    assert some["heads"] == "h4kv2d8w4"
    assert some["floor"]["kv_bytes"] == 2 * 4 * some["kv_bytes_per_token"]
    assert every["floor"]["kv_bytes"] == 2 * 96 * every["kv_bytes_per_token"]
    assert every["kv_bytes_peak"] == 2 * 8 * 16 * every["kv_bytes_per_token"]
    # The prompt is computed in one step, so its blocks are there until the next one.
    assert some["kv_bytes_peak"] == 2 * 4 * 16 * some["kv_bytes_per_token"]


def test_the_command_prints_one_json_line() -> None:
    flags = (
        "--layers 1 --hidden 32 --intermediate 48 --heads 4 --kv-heads 4,2 --window all,3 "
        "--head-dim 8 --vocab 64 --clients 2 --prompt 4 --output 4 --repeats 1"
    )
    answer = subprocess.run(
        [sys.executable, "-c", "from service.cli import app; app()", "bench", *flags.split()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert answer.stdout.count("\n") == 1
    assert len(json.loads(answer.stdout)["runs"]) == 4


def test_a_shape_that_cannot_work_is_refused_in_one_line() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", "from service.cli import app; app()", "bench", "--kv-heads", "5"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 2
    assert answer.stderr == "error: num_kv_heads is 5; allowed: a divisor of num_heads=12\n"
