"""Correctness, speed and profile of the engine on a GPU, in one run of less than nine minutes.

    python -m loadtests.gpu

Needs torch, Triton and, for the comparison, transformers; nothing else of the lock file. Writes
JSON, a table and a picture to `loadtests/results/gpu`; fails if anything is not correct. Where a
GPU is not had for so long, `--parts` measures some of it, to be written elsewhere with `--results`.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from loadtests.batches import Load
from loadtests.gpu import correctness, decode
from loadtests.gpu.budget import Budget
from loadtests.gpu.report import chart, markdown
from loadtests.gpu.shapes import SHAPES, random_on_device
from models.errors import ModelError
from service.bench import BenchShape, machine
from service.capacity.machine import copy_bandwidth
from service.engine.config import EngineConfig

RESULTS = Path(__file__).parent.parent / "results" / "gpu"
BATCHES = (1, 8, 64)
CONTEXTS = (512, 2048, 8192)
PEER_LOADS = ("8x256+128", "64x256+128")
_PEER_SHAPE = "0.5B-5kv"
_DRAWN = "0.5B", 64
PARTS = ("correctness", "decode", "peers")
_SECONDS = 520.0
# Of the free memory, what a cache may take beside weights, recorded steps and the rest.
_KV_SHARE = 0.8


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something is not correct, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.gpu", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the files go")
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="what no longer fits is left out"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
        help=f"what is measured: {', '.join(PARTS)} [default: all]")  # fmt: skip
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("device is cpu; allowed: a CUDA GPU that torch can use", file=sys.stderr)
        return 2
    budget, device = Budget(options.seconds), torch.device("cuda")
    document = run(budget, device, options.parts)
    document["command"] = f"python -m loadtests.gpu {' '.join(sys.argv[1:])}".strip()
    write(document, options.results)
    print(markdown(document))
    rows = itertools.chain(*document["correctness"].values())
    return 0 if all(row["passed"] for row in rows) else 1


def write(document: dict[str, Any], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    (results / "gpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (results / "gpu.md").write_text(markdown(document), encoding="utf-8")
    if (picture := chart(document, *_DRAWN)) is not None:
        (results / "gpu.svg").write_text(picture, encoding="utf-8")


def run(budget: Budget, device: torch.device, parts: Sequence[str]) -> dict[str, Any]:
    """What matters most first."""
    import triton

    bandwidth = copy_bandwidth(device)
    document: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(device),
        "triton": triton.__version__,
        "copy_bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "correctness": {},
        "decode": [],
        "profile": [],
        "peers": {},
    }
    if "correctness" in parts:
        document["correctness"] = _correctness(budget, device)
    for name, shape in SHAPES.items():
        if name == "1B-32kv" and "peers" in parts and budget.begin(f"peers, {_PEER_SHAPE}", 120):
            document["peers"] = _peers(budget, device)  # before less important models
        if "decode" in parts and budget.begin(f"decode, {name}", 25):
            _decode(name, shape, bandwidth, document, budget, device)
    document["ratios"] = decode.ratios(document["decode"])
    document["left_out"] = budget.left_out
    document["seconds"] = round(budget.passed, 1)
    return document


def _correctness(budget: Budget, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    attention = []
    budget.begin("attention against its definition", 0)
    for name, heads in correctness.HEADS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            errors = correctness.attention_errors(heads, dtype, device)
            attention.append({"heads": name, "dtype": str(dtype).removeprefix("torch."), **errors})
    budget.begin("products, norms and gates against their definitions", 0)
    products = [
        row
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for row in correctness.fused_errors(dtype, device)
    ]
    engine = []
    for kv_heads, window in ((4, None), (2, None), (1, None), (2, 40)):
        budget.begin(f"engine against the model, {kv_heads} key/value heads", 0)
        shape = BenchShape(4, 256, 688, 4, kv_heads, 64, 4096, "float32", window)
        row = correctness.engine_tokens(
            shape.model_config(1024),
            device,
            limits=EngineConfig(num_blocks=200, max_num_seqs=8, max_num_batched_tokens=128),
            prompts=[[n] * (30 * n + 1) for n in range(12)],
            num_tokens=60,
        )
        engine.append({"model": f"h4kv{kv_heads}d64 window {window}", **row})
    return {"attention": attention, "products": products, "engine": engine}


def _decode(
    name: str,
    shape: BenchShape,
    bandwidth: float,
    document: dict[str, Any],
    budget: Budget,
    device: torch.device,
) -> None:
    from loadtests.gpu.profile import profile

    longest = max(CONTEXTS)
    gc.collect()  # the engine before has graphs that refer to themselves
    torch.cuda.empty_cache()
    model = random_on_device(shape.model_config(longest + 256), device)
    per_block = 16 * model.config.kv_bytes_per_token()
    affordable = int(torch.cuda.mem_get_info(device)[0] * _KV_SHARE) // per_block
    cases = [(batch, context) for context in CONTEXTS for batch in BATCHES]
    fitting = [case for case in cases if decode.blocks_for(*case) <= affordable]
    for batch, context in (case for case in cases if case not in fitting):
        budget.leave_out(f"decode, {name}, {batch} x {context}", "the memory does not hold it")
    engine = decode.decoding_engine(
        model,
        max_batch=max(BATCHES),
        max_context=longest,
        num_blocks=max(decode.blocks_for(*case) for case in fitting),
    )
    label, _, _ = name.partition("-")
    for batch, context in fitting:
        if budget.begin(f"decode, {name}, {batch} x {context}", 5):
            row = decode.measure(engine, batch, context, bandwidth)
            document["decode"].append({"shape": label, "kv_heads": shape.kv_heads, **row})
    for batch in BATCHES:
        if budget.begin(f"profile, {name}, {batch} x {CONTEXTS[1]}", 5):
            document["profile"].append({"model": name, **profile(engine, batch, CONTEXTS[1])})


def _peers(budget: Budget, device: torch.device) -> dict[str, Any]:
    from loadtests.gpu.peers import compare

    try:
        loads = [Load.parse(text) for text in PEER_LOADS]
        return {_PEER_SHAPE: compare(SHAPES[_PEER_SHAPE], loads, device)}
    except (ImportError, ModelError, RuntimeError, ValueError, TypeError) as error:
        # Another library's version; what we measured of ourselves is not lost for it.
        budget.leave_out(f"peers, {_PEER_SHAPE}", f"{type(error).__name__}: {error}")
        return {}


if __name__ == "__main__":
    sys.exit(main())
