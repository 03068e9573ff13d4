"""Whole runs of our engine beside the continuous batching of transformers: same weights, same
prompts, same machine, one after the other."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loadtests.batches import Load
from loadtests.checkpoints import write_random_checkpoint
from service.bench import BenchShape
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.sampling_params import SamplingParams

_ROUNDS = 3
# Gives all of them back, in the order of the prompts.
_Generate = Callable[[list[list[int]], int], list[list[int]]]


def compare(shape: BenchShape, loads: list[Load], device: torch.device) -> dict[str, Any]:
    """Tokens per second of both, medians of rounds after one that is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        longest = max(load.prompt + load.output for load in loads)
        write_random_checkpoint(shape.model_config(longest), path)
        rows: dict[str, dict[str, float]] = {load.text: {} for load in loads}
        for name, start in (("headroom", _ours), ("transformers", _theirs)):
            generate = start(path, max(load.sequences for load in loads), device)
            for load in loads:
                rows[load.text][name] = _rate(generate, load, shape.vocab)
            del generate
            torch.cuda.empty_cache()
    for row in rows.values():
        row["times_as_fast"] = round(row["headroom"] / row["transformers"], 2)
    return {"tokens_per_s": rows, "transformers": _version()}


def _rate(generate: _Generate, load: Load, vocab: int) -> float:
    rng = random.Random(0)  # noqa: S311, a workload is no secret
    rates = []
    for _ in range(_ROUNDS + 1):
        prompts = [
            [rng.randrange(vocab) for _ in range(load.prompt)] for _ in range(load.sequences)
        ]
        started = time.perf_counter()
        outputs = generate(prompts, load.output)
        seconds = time.perf_counter() - started
        assert [len(output) for output in outputs] == [load.output] * load.sequences
        rates.append(load.sequences * load.output / seconds)
    return round(statistics.median(rates[1:]), 1)


def _ours(path: Path, max_num_seqs: int, device: torch.device) -> _Generate:
    config = EngineConfig(
        kernel="paged_triton",
        device=str(device),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=8192,
    )
    engine = Engine.from_checkpoint(path, config)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return [output.token_ids for output in engine.generate(prompts, params)]

    return generate


def _theirs(path: Path, max_num_seqs: int, device: torch.device) -> _Generate:
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).to(device)
    batching = ContinuousBatchingConfig(use_cuda_graph=True, use_async_batching=True)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        results = model.generate_batch(
            prompts,
            generation_config=GenerationConfig(
                max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=batching,
            persistent_manager=True,
        )
        # Named req_0, req_1 ... in the order of the prompts; they may end in another.
        ordered = sorted(results, key=lambda name: int(name.rpartition("_")[2]))
        return [results[name].generated_tokens for name in ordered]

    return generate


def _version() -> str:
    import transformers

    return str(transformers.__version__)
