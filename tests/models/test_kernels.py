"""All kernels that read the paged cache agree with each other and with loops over float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from models.config import HeadConfig
from models.cpu.library import why_unavailable
from models.errors import ConfigError
from models.kernels import KernelName, get_kernel, resolve_kernel
from models.transformer import Transformer
from tests.models import tiny
from tests.models.batches import EVERYTHING, Batch, Case, make_batch
from tests.models.kernels import CPU, KERNELS, computes, marks, needs_library
from tests.models.variants import EACH_HEAD, PLAIN, Variant, variants

# These compute in float64 too.
BY_TORCH: tuple[KernelName, ...] = ("dense", "reference")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    decodes = draw(st.lists(st.tuples(st.integers(0, 20), st.just(1)), max_size=4))
    chunks = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(2, 9)), max_size=3))
    if not decodes and not chunks:
        chunks = [(0, 2)]
    return Case(
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        block_size=draw(st.sampled_from([1, 2, 3, 4, 16])),
        sequences=(*decodes, *chunks),
        seed=draw(st.integers(0, 2**16)),
        tokens_per_gather=draw(st.sampled_from([1, 16, 50, 2**20])),
    )


def heads_of(case: Case) -> st.SearchStrategy[tuple[Case, Variant]]:
    return variants(case.num_kv_heads * case.group).map(lambda variant: (case, variant))


VARIED_CASES = cases().flatmap(heads_of)


@settings(max_examples=200)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_dense_equals_reference(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    batch = make_batch(case, torch.float32)
    assert (batch.run("dense", variant) - batch.run("reference", variant)).abs().max() <= 2e-6


# Lengths around which the kernel in C++ changes its ways: vectors of 16 keys, chunks of 64, spans
# of 256 that several threads may share, and 48 rows of queries at once.
@st.composite
def long_cases(draw: st.DrawFn) -> tuple[Case, Variant]:
    decodes = draw(st.lists(st.tuples(st.integers(0, 699), st.just(1)), max_size=3))
    chunks = draw(st.lists(st.tuples(st.integers(0, 500), st.integers(2, 150)), max_size=2))
    case = Case(
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 20])),
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16, 24, 32, 64, 80, 96, 128, 256])),
        block_size=draw(st.sampled_from([1, 5, 16, 32, 100])),
        sequences=(*decodes, *chunks) or ((700, 1),),
        seed=draw(st.integers(0, 2**16)),
    )
    num_heads = case.num_kv_heads * case.group
    sizes = st.sampled_from([None, 1, 16, 63, 64, 65, 200, 256, 257, 500])

    def each(numbers: st.SearchStrategy[float]) -> tuple[float, ...]:
        """A few numbers over and over again."""
        drawn = draw(st.lists(numbers, min_size=1, max_size=5))
        return tuple(drawn[head % len(drawn)] for head in range(num_heads))

    windows = draw(st.lists(sizes, min_size=1, max_size=5))
    variant = replace(
        draw(variants(1)),
        num_heads=num_heads,
        # Scores of about 1, as a model that was trained with this width has them.
        scales=tuple(scale * case.head_dim**-0.5 for scale in each(st.floats(0.25, 1.0))),
        window=draw(st.just(windows[0]) | st.just(tuple((windows * 60)[:num_heads]))),
        sink_tokens=draw(st.sampled_from([0, 0, 1, 5, 70])),
        alibi=draw(st.none() | st.sampled_from(["bloom", "mpt"])),
        sinks=each(st.floats(-4.0, 4.0)) if draw(st.booleans()) else None,
    )
    return case, variant


LONG = Case(2, 3, 80, 16, ((699, 1), (0, 1), (255, 1), (256, 1), (190, 129)), seed=1)


@needs_library
@settings(max_examples=60)
@given(varied=long_cases() | VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
@example(varied=(LONG, replace(PLAIN, scales=0.1)))
@example(varied=(LONG, replace(EACH_HEAD, scales=0.1)))
def test_paged_cpu_equals_reference(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    assume(computes("paged_cpu", case, variant, torch.float32))
    batch = make_batch(case, torch.float32)
    # A bias that grows with the position leaves fewer digits of a score behind the point; both
    # round there, for two keys that are weighed against each other.
    alibi, longest = variant.scoring().alibi, max(map(len, batch.keys))
    bias = max(alibi.slopes) * longest if alibi else 0.0
    error = (batch.run("paged_cpu", variant) - batch.run("reference", variant)).abs().max()
    assert error <= 4e-6 + 2**-21 * bias


@pytest.mark.parametrize("kernel", BY_TORCH)
@settings(max_examples=80)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_every_kernel_equals_loops_over_each_sequence_alone(
    kernel: KernelName, varied: tuple[Case, Variant]
) -> None:
    case, variant = varied
    batch = make_batch(case, torch.float64)
    output = batch.run(kernel, variant).numpy()
    for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
        expected = variant.expected(batch.query[span].numpy(), key.numpy(), value.numpy())
        assert np.abs(output[span] - expected.output).max() <= 1e-12


# Attention of one query has a path of its own in half precision.
@pytest.mark.parametrize("kernel", ["dense", pytest.param("paged_cpu", marks=needs_library)])
@settings(max_examples=150)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_in_bfloat16_a_query_errs_at_most_twice_as_much_as_eager_attention(
    kernel: KernelName, varied: tuple[Case, Variant]
) -> None:
    case, variant = varied
    assume(computes(kernel, case, variant, torch.bfloat16))
    batch = make_batch(case, torch.bfloat16)
    exact = Batch(
        batch.query.double(), batch.cache, batch.metadata, batch.spans, batch.keys, batch.values
    )
    output = batch.run(kernel, variant)
    eager = batch.run("reference", variant)
    for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
        expected = variant.expected(
            exact.query[span].numpy(), key.double().numpy(), value.double().numpy()
        ).output
        theirs = np.abs(eager[span].double().numpy() - expected).max()
        ours = np.abs(output[span].double().numpy() - expected).max()
        # Two roundings are allowed where eager attention happens to be nearly exact.
        assert ours <= max(2 * theirs, 2**-7 * value.abs().max().item())


# A cache is reused without being cleared: whatever finite numbers an earlier sequence left behind
# the end of this one must have no weight at all.
@pytest.mark.parametrize(
    ("kernel", "dtype", "stale"),
    [
        pytest.param(kernel, dtype, sign * size, marks=marks(kernel))
        for dtype, size, kernels in (
            (torch.float32, 1e30, (*BY_TORCH, "paged_cpu")),
            (torch.bfloat16, 1e30, (*BY_TORCH, "paged_cpu")),
            (torch.float16, 6e4, BY_TORCH),  # times a query it overflows
        )
        for sign in (1, -1)
        for kernel in kernels
    ],
)
@settings(max_examples=60)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_stale_content_behind_a_sequence_changes_nothing(
    kernel: KernelName, dtype: torch.dtype, stale: float, varied: tuple[Case, Variant]
) -> None:
    case, variant = varied
    assume(computes(kernel, case, variant, dtype))
    clean = make_batch(case, dtype).run(kernel, variant)
    assert torch.equal(make_batch(case, dtype, stale=stale).run(kernel, variant), clean)


@pytest.mark.parametrize("kernel", KERNELS)
def test_scale_is_the_callers(kernel: KernelName) -> None:
    batch = make_batch(EVERYTHING, torch.float32)
    outputs = [batch.run(kernel, Variant(scales=scale)) for scale in (0.05, 0.7)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


HEADS = HeadConfig(4, 2, 8)


def test_auto_is_the_kernel_in_cpp_where_it_runs_and_dense_elsewhere() -> None:
    runs = why_unavailable() is None
    assert resolve_kernel("auto", HEADS, torch.float32, CPU) == ("paged_cpu" if runs else "dense")
    assert resolve_kernel("auto", HEADS, torch.float64, CPU) == "dense"
    assert resolve_kernel("auto", HEADS, torch.float32, torch.device("meta")) == "dense"


def test_names_stay_as_they_are() -> None:
    for name in BY_TORCH:
        assert resolve_kernel(name, HEADS, torch.float16, CPU) == name
    assert len({get_kernel(name) for name in (*BY_TORCH, "paged_cpu", "paged_triton")}) == 4


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    unknown: KernelName = "flash"  # type: ignore[assignment]
    for use in (
        lambda: resolve_kernel(unknown, HEADS, torch.float32, CPU),
        lambda: Transformer(tiny.llama(), kernel=unknown),
    ):
        with pytest.raises(ConfigError) as caught:
            use()
        assert caught.value.field == "kernel"
        assert str(caught.value) == (
            "kernel is 'flash'; allowed: auto, paged_cpu, paged_triton, dense, reference"
        )
