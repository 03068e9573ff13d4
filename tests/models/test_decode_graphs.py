"""Recorded decode steps compute what the model does; here a tape stands for CUDA graphs, and
Triton's interpreter for a GPU."""

import functools
import gc
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.attention_metadata import AttentionMetadata
from models.config import HeadConfig
from models.gpu.decode_graphs import (
    Decode,
    DecodeGraphs,
    Replay,
    buckets,
    memory_bytes,
    why_uncapturable,
)
from models.kv_cache import KVCache
from models.positions import DynamicNtkScaling, RopeConfig
from models.sampler import NOTHING
from models.transformer import Transformer
from tests.models import tiny
from tests.models.kernels import CPU
from tests.models.tape import tape

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
ROPE = RopeConfig(10_000.0, 16)
HEADS = HeadConfig(1, 1, 16, rope=ROPE)
# Two groups of heads; the second remembers less.
CONFIG = tiny.llama(layers=(HEADS, replace(HEADS, window=5)), logit_softcap=3.0)
PAGES = 12
SIZE = 4


def cache_of(model: Transformer, seed: int = 5) -> KVCache:
    cache = KVCache(model.config, num_pages=PAGES, block_size=SIZE, dtype=model.dtype, device=CPU)
    cache.pool.normal_(generator=torch.Generator().manual_seed(seed))
    return cache


def eager(model: Transformer, cache: KVCache, decodes: list[Decode]) -> Tensor:
    """Logits of a step that is not recorded."""
    metadata = AttentionMetadata.build(
        block_tables=[decode.block_tables for decode in decodes],
        num_computed_tokens=[decode.position for decode in decodes],
        num_new_tokens=[1] * len(decodes),
        block_size=SIZE,
        device=CPU,
    )
    ids = torch.tensor([decode.token for decode in decodes])
    positions = torch.tensor([decode.position for decode in decodes])
    return model.project_to_vocab(model(ids, positions, cache, metadata))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny.model(CONFIG, kernel="paged_triton")


@needs_triton
@torch.inference_mode()
def test_a_recorded_step_is_the_step_itself(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches of one to three, one after the other, across two bounds of lengths; rows of
    nobody write nothing."""
    monkeypatch.setattr("models.gpu.decode_graphs._LEAST_LENGTH", 8)
    recorded, plain = cache_of(model), cache_of(model)
    told: list[tuple[int, int]] = []
    graphs = DecodeGraphs(
        model,
        recorded,
        max_num_seqs=4,
        max_length=16,
        capture=tape,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(done, 6) for done in range(7)]
    assert torch.equal(recorded.pool, plain.pool), "recording writes nothing"
    long = Decode(7, 11, [[0, 3, 1], [-1, 2, 4]])
    short, first = Decode(9, 5, [[5, 6], [5, 6]]), Decode(11, 0, [[8], [9]])
    for decodes in ([long, short, first], [short]):
        expected = eager(model, plain, decodes)
        logits, tokens = graphs.run(decodes)
        assert (logits - expected).abs().max() <= 1e-5
        assert torch.equal(tokens, expected.argmax(dim=-1))
        assert (recorded.pool - plain.pool).abs().max() <= 1e-5
    # Behind a step whose tokens the host does not know.
    before = torch.tensor([3, NOTHING, 9, 7])
    following = [long._replace(token=3), short._replace(token=2), first._replace(token=1)]
    logits, _ = graphs.run(following, before)
    expected = eager(model, plain, [long, short, first._replace(token=0)])
    assert (logits - expected).abs().max() <= 1e-5


@needs_triton
@torch.inference_mode()
def test_what_is_not_finite_has_no_token() -> None:
    """Although a cap on the logits may hide it."""
    broken = tiny.model(CONFIG, kernel="paged_triton")
    broken.embed_tokens.weight[3] = torch.nan
    graphs = DecodeGraphs(broken, cache_of(broken), max_num_seqs=2, max_length=8, capture=tape)
    decodes = [Decode(3, 0, [[0], [1]]), Decode(4, 0, [[2], [3]])]
    logits, tokens = graphs.run(decodes)
    assert tokens.tolist() == [NOTHING, logits[1].argmax()]
    assert logits[1].isfinite().all()
    assert broken.final_norm is not None
    broken.final_norm.weight[0] = torch.inf
    logits, tokens = graphs.run(decodes)
    assert tokens.tolist() == [NOTHING, NOTHING]
    assert logits.isnan().any(dim=1).all()


@needs_triton
def test_what_a_graph_reads_stays(model: Transformer) -> None:
    """It knows addresses only: what was made for a recording must not be freed after it."""
    read: list[weakref.ref[object]] = []

    def capture(step: Callable[[], None]) -> Replay:
        step()
        assert isinstance(step, functools.partial)
        read.extend(weakref.ref(group) for group in step.args[0].metadata.groups)
        return lambda: None

    graphs = DecodeGraphs(model, cache_of(model), max_num_seqs=2, max_length=8, capture=capture)
    gc.collect()
    assert len(read) == 2 * 2, "of two sizes and two groups"
    assert all(reference() is not None for reference in read)
    del graphs


@pytest.mark.parametrize(
    ("least", "most", "sizes"),
    [
        (1, 1, [1]),
        (1, 6, [1, 2, 4, 6]),
        (1, 64, [1, 2, 4, 8, 16, 32, 64]),
        (512, 300, [300]),
        (512, 512, [512]),
        (512, 2000, [512, 1024, 2000]),
    ],
)
def test_sizes_double_up_to_the_largest(least: int, most: int, sizes: list[int]) -> None:
    assert buckets(least, most) == sizes


@needs_triton
@pytest.mark.parametrize(
    ("changes", "kernel", "reason"),
    [
        ({}, "paged_triton", None),
        ({}, "reference", "attention is computed by reference"),
        (
            {"layers": (replace(HEADS, rope=replace(ROPE, scaling=DynamicNtkScaling(2.0, 8))),)},
            "paged_triton",
            "rotations depend on the length of a text",
        ),
        (
            {"layers": (HeadConfig(2, 2, 16, window=(4, None)),)},
            "paged_triton",
            "heads of one layer remember different stretches of the past",
        ),
        (
            {"num_experts": 2, "num_experts_per_token": 1, "swiglu_limit": 7.0},
            "paged_triton",
            "experts are picked by the host",
        ),
    ],
    ids=["all", "kernel", "rotation", "groups", "experts"],
)
def test_what_cannot_be_recorded_says_why(
    changes: dict[str, object], kernel: str, reason: str | None
) -> None:
    built = tiny.model(CONFIG.replace(**changes), kernel=kernel)  # type: ignore[arg-type]
    assert why_uncapturable(built, cache_of(built)) == reason


def test_memory_grows_with_batch_and_length(model: Transformer) -> None:
    sizes = [memory_bytes(model, max_num_seqs=b, max_length=n) for b, n in ((1, 512), (2, 512))]
    assert sizes[1] == 2 * sizes[0]
    logits = 2 * CONFIG.vocab_size * 4
    assert sizes[0] > logits
    assert memory_bytes(model, max_num_seqs=1, max_length=8192) > sizes[0]
