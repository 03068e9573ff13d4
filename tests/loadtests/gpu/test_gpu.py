"""What measures a GPU, without one: arithmetic, pages, refusals, parts that run anywhere."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtests.gpu import correctness, decode
from loadtests.gpu.__main__ import main, write
from loadtests.gpu.budget import Budget
from loadtests.gpu.profile import covered, summary
from loadtests.gpu.report import chart
from loadtests.gpu.shapes import SHAPES, random_on_device, step_bytes
from models.config import HeadConfig
from models.transformer import Transformer
from service.bench import BenchShape
from service.engine.config import EngineConfig
from tests.fakes import FakeClock
from tests.models.kernels import CPU
from tests.models.tape import tape

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
SMALL = BenchShape(1, 32, 48, 2, 1, 16, 64, "float32")


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--results", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "device is cpu; allowed: a CUDA GPU that torch can use\n"
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_what_no_longer_fits_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock(50.0)
    budget = Budget(100.0, clock)
    assert budget.begin("first", 100)
    clock.advance(60)
    assert not budget.begin("second", 41)
    assert budget.begin("third", 40)
    assert budget.left_out == ["second: no time is left"]
    assert capsys.readouterr().err.splitlines() == [
        "    0 s  first",
        "   60 s  left out: second: no time is left",
        "   60 s  third",
    ]


@pytest.mark.parametrize(("name", "megabytes"), [("0.5B-5kv", 939), ("1B-8kv", 2472)])
def test_models_have_the_weights_that_their_names_say(name: str, megabytes: int) -> None:
    shape = SHAPES[name]
    with torch.device("meta"):
        model = Transformer(shape.model_config(128)).to(torch.bfloat16)
    assert step_bytes(model, 0, 0) == pytest.approx(megabytes * 1e6, rel=2e-3)
    context = step_bytes(model, 2, 100) - step_bytes(model, 0, 0)
    assert context == 2 * 100 * (2 * shape.layers * shape.kv_heads * 64 * 2)


def test_a_profile_tells_kernels_from_what_lies_between() -> None:
    kernels = [("b", 30.0, 40.0), ("a", 0.0, 10.0), ("a", 5.0, 20.0), ("c", 32.0, 34.0)]
    found = summary(kernels, 2)
    assert (found["step_us"], found["outside_kernels_us"]) == (20.0, 5.0)
    assert found["kernels_per_step"] == 2.0
    assert found["kernels"][0] == {"name": "a", "us_per_step": 12.5, "calls_per_step": 1.0}
    assert covered([]) == 0.0


def test_steps_are_drawn_by_context() -> None:
    rows = [
        {"shape": "0.5B", "kv_heads": heads, "batch": 64, "context": context}
        | {"step_ms": 2.0 * heads, "floor_ms": 1.0 * heads}
        for heads in (4, 1)
        for context in (512, 2048)
    ]
    document = {"machine": {"device": "a GPU"}, "decode": rows}
    picture = chart(document, "0.5B", 64)
    assert picture is not None
    assert picture.count("<polyline") == 4, "a line and its bytes for both"
    assert "4 kv heads, bytes" in picture
    assert "0.5B, 64 sequences on one a GPU" in picture
    assert chart(document, "1B", 64) is None
    assert chart({**document, "decode": rows[:1]}, "0.5B", 64) is None


def test_ratios_are_to_the_fewest_heads() -> None:
    rows = [
        {"shape": shape, "kv_heads": heads, "batch": 8, "context": 512, "step_ms": ms, "bytes": n}
        for shape, heads, ms, n in (("a", 4, 3.0, 200), ("a", 1, 2.0, 100), ("b", 4, 9.0, 900))
    ]
    (ratio,) = decode.ratios(rows)
    assert ratio == {
        "shape": "a", "kv_heads": 4, "batch": 8, "context": 512,
        "measured": 1.5, "predicted": 2.0, "off_by": -0.25,
    }  # fmt: skip


def test_decodes_are_measured_at_a_context_that_nobody_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "STEPS", 4)
    model = random_on_device(SMALL.model_config(200), CPU, kernel="reference")
    engine = decode.decoding_engine(
        model, max_batch=2, max_context=40, num_blocks=decode.blocks_for(2, 40)
    )
    seen: list[tuple[int, int]] = []
    engine.on_step = lambda stats: seen.append((stats.num_tokens, stats.kv_bytes))
    row = decode.measure(engine, 2, 40, bandwidth=1e9)
    per_token = model.config.kv_bytes_per_token()
    assert seen[0] == (2, 2 * 41 * per_token)
    assert [count for count, _ in seen] == [2] * 12
    assert row["bytes"] == model.step_bytes + 2 * (40 + 8 + 2) * per_token
    assert row["share_of_copy_bandwidth"] == pytest.approx(
        row["floor_ms"] / row["step_ms"], abs=2e-3
    )
    assert not engine.has_unfinished


@needs_triton
def test_correct_is_told_from_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heads = HeadConfig(2, 1, 16, window=9, sink_tokens=2, learned_sinks=True, softcap=5.0)
    sequences = ((20, 1), (0, 5))
    right, half = (
        correctness.attention_errors(heads, dtype, CPU, sequences)
        for dtype in (torch.float32, torch.float16)
    )
    assert right["passed"]
    assert half["passed"]
    assert right["ours"] < half["ours"]
    monkeypatch.setattr(correctness, "PRODUCTS", ((1400, 1000), (5200, 520)))
    parts = correctness.fused_errors(torch.float32, CPU)
    assert {(row["what"], row["rows"]) for row in parts} >= {("product", 16), ("norm", 64)}
    assert all(row["passed"] for row in parts)
    limits = EngineConfig(num_blocks=8, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=16)
    found = correctness.engine_tokens(
        SMALL.model_config(64),
        CPU,
        limits=limits,
        prompts=[[1, 2], [3]],
        num_tokens=3,
        capture=tape,
    )
    assert found["passed"]
    assert found["backend"] == "paged_triton (graphs)"
    off = replace(limits, cuda_graphs=False)
    assert not correctness.engine_tokens(
        SMALL.model_config(64), CPU, limits=off, prompts=[[1]], num_tokens=1
    )["passed"]
    monkeypatch.setattr("models.gpu.attention._LOG2_E", 1.4)
    assert not correctness.attention_errors(heads, torch.float32, CPU, sequences)["passed"]
    rows = [{"heads": "mha", "dtype": "float32", **right}]
    document: dict[str, Any] = {
        "command": "python -m loadtests.gpu",
        "date": "2026-01-02",
        "machine": {"device": "a GPU", "torch": "2.11"},
        "triton": "3.6",
        "copy_bandwidth_gb_per_s": 4000.0,
        "correctness": {
            "attention": rows,
            "products": [{"what": "norm", "rows": 8, "weight": "9 x 7", **rows[0]}],
            "engine": [{"model": "small", **found}],
        },
        "decode": [
            {"shape": "1B", "kv_heads": 8, "batch": 64, "context": 512, "step_ms": 1.5}
            | {"floor_ms": 1.2, "share_of_copy_bandwidth": 0.8, "tokens_per_s": 42666.7}
        ],
        "ratios": [
            {"shape": "1B", "kv_heads": 8, "batch": 64, "context": 512}
            | {"measured": 1.4, "predicted": 1.5, "off_by": -0.067}
        ],
        "profile": [
            {"model": "1B-8kv", "batch": 1, "context": 2048, "step_us": 700.0}
            | {"outside_kernels_us": 40.0, "kernels_per_step": 200.0}
        ],
        "peers": {
            "0.5B-5kv": {
                "transformers": "5",
                "tokens_per_s": {
                    "8x256+128": {"headroom": 4000.5, "transformers": 1000, "times_as_fast": 4.0}
                },
            }
        },
        "left_out": ["decode, 64 x 8192: the memory does not hold it"],
    }
    write(document, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "gpu.json").read_text()) == document
    page = (tmp_path / "new" / "gpu.md").read_text()
    assert "| norm, 8 rows, 9 x 7, float32 |" in page
    assert "| engine, small, paged_triton (graphs) |" in page
    assert "| 1B, 8 key/value heads | 64 x 512 | 1.5 | 1.2 | 0.8 | 42,666.7 |" in page
    assert "| 1B, 8 | 64 x 512 | 1.4 | 1.5 | -6.7% |" in page
    assert "| 1B-8kv, 1 x 2048 | 700.0 | 40.0 | 200.0 |" in page
    assert "| 8x256+128 | 4,000.5 | 1,000 | 4.0 |" in page
    assert "- decode, 64 x 8192: the memory does not hold it" in page
