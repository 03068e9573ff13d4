"""All kernels agree with the definition, and the definition with loops over float64 numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from models.config import HeadConfig
from models.errors import ConfigError
from models.kernels import KernelName, dense, get_kernel, reference, resolve_kernel
from models.kernels.reference import Attended
from models.kv_cache import AttentionMetadata, CachePart, GroupMetadata, KVCache
from models.positions import Alibi, alibi_slopes, mpt_alibi_slopes
from models.scoring import Scoring
from models.transformer import Transformer
from tests.models import numpy_oracle, tiny
from tests.models.numpy_oracle import Array

KERNELS: tuple[KernelName, ...] = ("dense", "reference")
MPT_BIAS_MAX = 16


@dataclass(frozen=True)
class Variant:
    """What may be added to plain causal attention, for each of `num_heads` heads."""

    num_heads: int = 6
    scales: tuple[float, ...] | float = 0.37
    window: tuple[int | None, ...] | int | None = None
    sink_tokens: int = 0
    softcap: float | None = None
    alibi: str | None = None
    sinks: tuple[float, ...] | None = None
    causal: bool = True

    def scoring(self) -> Scoring:
        return Scoring(
            scale=self.scales
            if isinstance(self.scales, float)
            else torch.tensor(self.scales, dtype=torch.float64),
            causal=self.causal,
            window=self.window,
            sink_tokens=self.sink_tokens,
            softcap=self.softcap,
            alibi=self._alibi(),
            sinks=None if self.sinks is None else torch.tensor(self.sinks, dtype=torch.float64),
        )

    def _alibi(self) -> Alibi | None:
        match self.alibi:
            case "bloom":
                return Alibi(alibi_slopes(self.num_heads))
            case "mpt":
                return Alibi(mpt_alibi_slopes(self.num_heads, MPT_BIAS_MAX))
            case "falcon":
                return Alibi(alibi_slopes(self.num_heads), before_scale=True, bfloat16=True)
        return None

    def expected(self, query: Array, key: Array, value: Array) -> numpy_oracle.Read:
        """By the oracle, for one sequence whose last query stands at its last key."""
        num_heads, shift = self.num_heads, len(key) - len(query)
        scales = (self.scales,) * num_heads if isinstance(self.scales, float) else self.scales
        windows = self.window if isinstance(self.window, tuple) else (self.window,) * num_heads

        def sees(head: int, row: int, at: int) -> bool:
            if self.causal and at > row + shift:
                return False
            return numpy_oracle.in_window(row + shift, at, windows[head], self.sink_tokens)

        def bias(head: int, at: int) -> float:
            slope = numpy_oracle.alibi_slopes(num_heads)[head]
            if self.alibi == "falcon":
                rounded = numpy_oracle.bfloat16
                return rounded(rounded(slope) * rounded(at)) * scales[head]
            if self.alibi == "mpt":
                slope **= MPT_BIAS_MAX / 8
            return slope * at if self.alibi else 0.0

        return numpy_oracle.attention(
            query,
            key,
            value,
            sees,
            scales=scales,
            softcap=self.softcap,
            bias=bias,
            sinks=self.sinks,
        )


@st.composite
def variants(draw: st.DrawFn, num_heads: int) -> Variant:
    """Several at once, in any mix."""

    def each(numbers: st.SearchStrategy[float]) -> tuple[float, ...]:
        return tuple(draw(st.lists(numbers, min_size=num_heads, max_size=num_heads)))

    sizes = st.none() | st.integers(1, 24)
    windows = st.lists(sizes, min_size=num_heads, max_size=num_heads).map(tuple)
    window = draw(sizes | windows)
    # Slopes and biases are float32; these are exact there.
    exact = num_heads in (1, 2, 4, 8)
    alibi = draw(st.none() | st.sampled_from(["bloom", "mpt", "falcon"])) if exact else None
    scale = 0.25 if alibi == "falcon" else 0.37
    return Variant(
        num_heads=num_heads,
        scales=each(st.floats(0.05, 0.6)) if alibi != "falcon" and draw(st.booleans()) else scale,
        window=window,
        sink_tokens=draw(st.integers(0, 5)),
        softcap=draw(st.none() | st.floats(0.5, 5.0)),
        alibi=alibi,
        sinks=each(st.floats(-4.0, 4.0)) if draw(st.booleans()) else None,
    )


@dataclass(frozen=True)
class Case:
    """A batch: `(tokens in the cache, new tokens)` of each sequence, decodes first."""

    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    sequences: tuple[tuple[int, int], ...]
    seed: int


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
    )


def heads_of(case: Case) -> st.SearchStrategy[tuple[Case, Variant]]:
    return variants(case.num_kv_heads * case.group).map(lambda variant: (case, variant))


VARIED_CASES = cases().flatmap(heads_of)


@dataclass(frozen=True)
class Batch:
    """A case as tensors; `spans` are the rows of each sequence, `keys` and `values` its own."""

    query: Tensor
    cache: CachePart
    metadata: GroupMetadata
    spans: list[slice]
    keys: list[Tensor]
    values: list[Tensor]

    def run(self, kernel: KernelName, variant: Variant) -> Tensor:
        return get_kernel(kernel)(self.query, self.cache, self.metadata, variant.scoring())


def make_batch(case: Case, dtype: torch.dtype, *, stale: float = 0.0) -> Batch:
    """Scatter sequences over shuffled blocks of a cache that held `stale` before."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.block_size
    lengths = [computed + new for computed, new in case.sequences]
    num_blocks = sum(-(-length // size) for length in lengths) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[free.pop() for _ in range(-(-length // size))] for length in lengths]
    heads = HeadConfig(case.num_kv_heads * case.group, case.num_kv_heads, case.head_dim)
    cache = KVCache(
        tiny.gpt2(layers=(heads,)),
        num_pages=num_blocks,
        block_size=size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    cache.pool.fill_(stale)
    ((part,),) = cache.layers
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for table, length in zip(tables, lengths, strict=True):
        shape = (2, length, case.num_kv_heads, case.head_dim)
        key, value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        slots = [table[at // size] * size + at % size for at in range(length)]
        part.write(key, value, torch.tensor(slots))
        keys.append(key)
        values.append(value)
    ends = np.cumsum([new for _, new in case.sequences]).tolist()
    query = torch.randn(
        (ends[-1], heads.num_heads, heads.head_dim), generator=generator, dtype=torch.float64
    )
    metadata = AttentionMetadata.build(
        block_tables=[[table] for table in tables],
        num_computed_tokens=[computed for computed, _ in case.sequences],
        num_new_tokens=[new for _, new in case.sequences],
        block_size=size,
        device=torch.device("cpu"),
    )
    return Batch(
        query=query.to(dtype),
        cache=part,
        metadata=metadata.groups[0],
        spans=[slice(end - new, end) for end, (_, new) in zip(ends, case.sequences, strict=True)],
        keys=keys,
        values=values,
    )


EVERYTHING = Case(2, 3, 8, 4, ((16, 1), (0, 1), (3, 1), (4, 1), (0, 8), (3, 5), (12, 2)), seed=1)
PLAIN = Variant()
EACH_HEAD = Variant(
    scales=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    window=(1, 3, None, 6, 2, 50),
    sink_tokens=2,
    softcap=1.5,
    sinks=(-1.0, 0.0, 1.0, 2.0, 3.0, 0.5),
)


# The paged kernels


@settings(max_examples=200)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_dense_equals_reference(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    batch = make_batch(case, torch.float32)
    assert (batch.run("dense", variant) - batch.run("reference", variant)).abs().max() <= 2e-6


@pytest.mark.parametrize("kernel", KERNELS)
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


# A cache is reused without being cleared: whatever finite numbers an earlier sequence left behind
# the end of this one must have no weight at all.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stale", [1e30, -1e30])
@settings(max_examples=60)
@given(varied=VARIED_CASES)
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
def test_stale_content_behind_a_sequence_changes_nothing(
    kernel: KernelName, stale: float, varied: tuple[Case, Variant]
) -> None:
    case, variant = varied
    clean = make_batch(case, torch.float32).run(kernel, variant)
    assert torch.equal(make_batch(case, torch.float32, stale=stale).run(kernel, variant), clean)


# Without a cache


class Inputs(NamedTuple):
    """Heads before tokens, as the model has them."""

    query: Tensor
    key: Tensor
    value: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(part.to(dtype) for part in self))

    def last(self, count: int) -> "Inputs":
        """Only the last queries."""
        return Inputs(self.query[:, :, -count:], self.key, self.value)

    def row(self, index: int) -> tuple[Array, Array, Array]:
        """One of the batch as the oracle has it, tokens before heads."""
        query, key, value = (part[index].transpose(0, 1).double().numpy() for part in self)
        return query, key, value


def random_inputs(
    *, batch: int, num_heads: int, num_kv_heads: int, length: int, dim: int, seed: int = 0
) -> Inputs:
    """In float64."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return Inputs(query, key, value)


def both(variant: Variant, inputs: Inputs) -> tuple[Tensor, Attended]:
    """What the dense and the reference implementation say; the last query is at the last key."""
    scoring, length = variant.scoring(), inputs.key.shape[2]
    positions = torch.arange(length)[None]
    visible = scoring.visible(positions[:, length - inputs.query.shape[2] :], positions)
    bias = scoring.bias(positions)
    return (
        dense.attend(*inputs, scoring, visible=visible, bias=bias),
        reference.attend(*inputs, scoring, visible=visible, bias=bias),
    )


def check_both(variant: Variant, inputs: Inputs) -> None:
    """Both implementations, and all that the reference tells, against the oracle."""
    bar = 1e-12
    fused, plain = both(variant, inputs)
    assert fused.shape == inputs.query.shape
    for row in range(len(fused)):
        expected = variant.expected(*inputs.row(row))
        output = torch.from_numpy(expected.output).transpose(0, 1)
        assert (fused[row] - output).abs().max() <= bar
        assert (plain.output[row] - output).abs().max() <= bar
        assert (plain.weights[row] - torch.from_numpy(expected.weights)).abs().max() <= bar
        assert (plain.lse[row] - torch.from_numpy(expected.lse)).abs().max() <= bar


@settings(max_examples=100)
@given(data=st.data())
def test_attention_without_a_cache_equals_loops(data: st.DataObject) -> None:
    num_kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    num_queries, num_cached = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 7))
    inputs = random_inputs(
        batch=2,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        length=num_cached + num_queries,
        dim=data.draw(st.sampled_from([1, 3, 8])),
        seed=data.draw(st.integers(0, 2**16)),
    )
    variant = data.draw(variants(num_kv_heads * group))
    variant = replace(variant, causal=data.draw(st.sampled_from([True, True, False])))
    check_both(variant, inputs.last(num_queries))


LARGE: dict[str, Variant] = {
    "plain": Variant(8),
    "bidirectional": Variant(8, causal=False),
    "window": Variant(8, window=33),
    "bidirectional-window": Variant(8, window=7, causal=False),
    "window-each-head": Variant(8, window=(1, 5, None, 64, 128, 129, 200, 3), sink_tokens=4),
    "softcap": Variant(8, scales=0.9, softcap=2.0),
    "sinks": Variant(8, sinks=(-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 5.0, 9.0)),
    "bloom": Variant(8, alibi="bloom"),
    "mpt": Variant(8, alibi="mpt"),
    "falcon": Variant(8, alibi="falcon", scales=0.25),
    "temperature": Variant(8, scales=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
}


@pytest.mark.parametrize(("length", "dim"), [(129, 16), (33, 80), (17, 64), (1, 8)])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("name", LARGE)
def test_long_sequences_and_wide_heads_equal_loops(
    name: str, num_kv_heads: int, length: int, dim: int
) -> None:
    inputs = random_inputs(
        batch=1, num_heads=8, num_kv_heads=num_kv_heads, length=length, dim=dim, seed=length
    )
    check_both(LARGE[name], inputs)


# Falcon's biases lose whole positions above 256, which is seen only in long sequences.
def test_falcons_biases_are_rounded_at_long_positions_too() -> None:
    variant = LARGE["falcon"]
    inputs = random_inputs(batch=1, num_heads=8, num_kv_heads=1, length=301, dim=8)
    check_both(variant, inputs.last(3))
    late = torch.tensor([[256, 257]])
    rounded, whole = (
        replace(variant, scales=1.0, alibi=alibi).scoring().bias(late)
        for alibi in ("falcon", "bloom")
    )
    assert rounded is not None
    assert whole is not None
    assert (rounded[..., 0] == rounded[..., 1]).all(), "bfloat16 does not know 257"
    assert (whole[..., 0] != whole[..., 1]).all()


def document_mask(length: int) -> Tensor:
    """Several sequences in one, each causal in itself."""
    documents = torch.arange(length) // 5
    return (documents[:, None] == documents) & torch.ones(length, length).tril().bool()


def prefix_mask(length: int) -> Tensor:
    """The first tokens are seen by all, the others causally."""
    mask = torch.ones(length, length).tril().bool()
    mask[:, :4] = True
    return mask


def blind_mask(length: int) -> Tensor:
    """Queries that see nothing at all."""
    mask = torch.ones(length, length).tril().bool()
    mask[[0, 3]] = False
    return mask


@pytest.mark.parametrize("make_mask", [document_mask, prefix_mask, blind_mask])
@pytest.mark.parametrize("variant", [PLAIN, replace(EACH_HEAD, window=None)], ids=["plain", "all"])
def test_any_mask_can_be_given(make_mask: Callable[[int], Tensor], variant: Variant) -> None:
    inputs = random_inputs(batch=2, num_heads=6, num_kv_heads=2, length=13, dim=8)
    mask = make_mask(13)
    scoring = variant.scoring()
    fused = dense.attend(*inputs, scoring, visible=mask[None, None])
    plain = reference.attend(*inputs, scoring, visible=mask[None, None])
    for row in range(2):
        expected = numpy_oracle.attention(
            *inputs.row(row),
            lambda head, at, of: bool(mask[at, of]),
            scales=(0.37,) * 6 if isinstance(variant.scales, float) else variant.scales,
            softcap=variant.softcap,
            sinks=variant.sinks,
        )
        output = torch.from_numpy(expected.output).transpose(0, 1)
        assert (fused[row] - output).abs().max() <= 1e-12
        assert (plain.output[row] - output).abs().max() <= 1e-12
        assert (plain.weights[row] - torch.from_numpy(expected.weights)).abs().max() <= 1e-12
        assert torch.equal(plain.lse[row].isinf(), torch.from_numpy(np.isinf(expected.lse)))
    assert (plain.weights[:, :, ~mask] == 0).all(), "exactly 0 where nothing is seen"


@pytest.mark.parametrize("length", [1, 2, 13])
def test_a_flag_for_causal_is_the_causal_mask(length: int) -> None:
    inputs = random_inputs(batch=2, num_heads=6, num_kv_heads=2, length=length, dim=8)
    for variant in (PLAIN, Variant(softcap=2.0), Variant(sinks=(0.5,) * 6)):
        flagged = dense.attend(*inputs, variant.scoring(), is_causal=length > 1)
        mask = torch.ones(length, length).tril().bool()[None, None]
        masked = reference.attend(*inputs, variant.scoring(), visible=mask)
        assert (flagged - masked.output).abs().max() <= 1e-12


# Against others


def compare_in_float32(variant: Variant, theirs: Tensor, inputs: Inputs) -> None:
    """Ours are near theirs, and no worse than twice theirs against the oracle."""
    fused, plain = both(variant, inputs.to(torch.float32))
    exact = torch.from_numpy(variant.expected(*inputs.row(0)).output).transpose(0, 1)
    bar = 2 * float((theirs[0] - exact).abs().max())
    for ours in (fused, plain.output):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= 2e-6
        assert (ours[0] - exact).abs().max() <= bar


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    "variant", [PLAIN, Variant(window=9), Variant(causal=False)], ids=["causal", "window", "both"]
)
def test_float32_is_as_exact_as_torchs_own_mathematics(variant: Variant, num_kv_heads: int) -> None:
    inputs = random_inputs(
        batch=1, num_heads=6, num_kv_heads=num_kv_heads, length=65, dim=64, seed=3
    )
    variant = replace(variant, scales=0.125)
    rows = torch.arange(65)
    distance = rows[:, None] - rows
    mask = (distance >= 0) | (not variant.causal)
    if variant.window is not None:
        mask &= distance < 9
    with sdpa_kernel(SDPBackend.MATH):
        theirs = scaled_dot_product_attention(
            *inputs.to(torch.float32), attn_mask=mask, enable_gqa=True
        )
    compare_in_float32(variant, theirs, inputs)


def additive(length: int) -> Tensor:
    return torch.full((1, 1, length, length), -math.inf).triu(1)


def test_learned_sinks_equal_gpt_oss() -> None:
    inputs = random_inputs(batch=1, num_heads=6, num_kv_heads=2, length=33, dim=16)
    variant = Variant(scales=0.25, sinks=(-3.0, -1.0, 0.0, 1.0, 2.0, 4.0))
    module = SimpleNamespace(
        sinks=torch.tensor(variant.sinks), num_key_value_groups=3, training=False
    )
    theirs, weights = modeling_gpt_oss.eager_attention_forward(
        module, *inputs.to(torch.float32), additive(33), scaling=0.25
    )
    compare_in_float32(variant, theirs.transpose(1, 2), inputs)
    _, ours = both(variant, inputs.to(torch.float32))
    assert (ours.weights - weights).abs().max() <= 1e-6


def test_the_soft_cap_equals_gemma_2() -> None:
    inputs = random_inputs(batch=1, num_heads=6, num_kv_heads=2, length=33, dim=16)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    theirs, _ = modeling_gemma2.eager_attention_forward(
        module, *inputs.to(torch.float32), additive(33), scaling=0.9, softcap=2.0
    )
    compare_in_float32(Variant(scales=0.9, softcap=2.0), theirs.transpose(1, 2), inputs)


# Known relations


@pytest.mark.parametrize("sink", [-30.0, -1.0, 0.0, 3.0, 30.0])
def test_a_sink_only_shrinks_what_is_read(sink: float) -> None:
    """By the logistic function of log-sum-exp minus sink (Miller 2023)."""
    inputs = random_inputs(batch=2, num_heads=4, num_kv_heads=2, length=17, dim=8)
    mask = torch.ones(17, 17).tril().bool()[None, None]
    plain = reference.attend(*inputs, Scoring(0.4), visible=mask)
    scoring = Scoring(0.4, sinks=torch.full((4,), sink, dtype=torch.float64))
    expected = torch.sigmoid(plain.lse - sink)[..., None] * plain.output
    with_sink = reference.attend(*inputs, scoring, visible=mask)
    assert (with_sink.output - expected).abs().max() <= 1e-12
    assert torch.equal(with_sink.lse, plain.lse), "the sink is no key"
    assert (dense.attend(*inputs, scoring, is_causal=True) - expected).abs().max() <= 1e-12


def test_a_cap_that_never_bites_and_a_window_that_never_ends_change_nothing() -> None:
    inputs = random_inputs(batch=1, num_heads=4, num_kv_heads=2, length=17, dim=8)
    positions = torch.arange(17)[None]
    plain = Scoring(0.4)
    expected = dense.attend(*inputs, plain, is_causal=True)
    for scoring in (
        Scoring(0.4, softcap=1e9),
        Scoring(0.4, window=17),
        Scoring(0.4, window=(17, None, 99, 17)),
        Scoring(0.4, window=1, sink_tokens=17),
        Scoring(torch.full((4,), 0.4, dtype=torch.float64)),
    ):
        visible = scoring.visible(positions, positions)
        output = dense.attend(*inputs, scoring, visible=visible)
        assert (output - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_scale_is_the_callers(kernel: KernelName) -> None:
    batch = make_batch(EVERYTHING, torch.float64)
    outputs = [batch.run(kernel, Variant(scales=scale)) for scale in (0.05, 0.7)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "variant", [Variant(2), Variant(2, softcap=1e4), Variant(2, sinks=(0.0,) * 2)]
)
def test_large_scores_do_not_overflow(variant: Variant) -> None:
    inputs = Inputs(*(200 * torch.randn(3, 1, 2, 6, 8)))
    variant = replace(variant, scales=1.0)
    expected = variant.expected(*inputs.row(0)).output
    fused, plain = both(variant, inputs)
    for output in (fused, plain.output):
        difference = np.abs(output[0].transpose(0, 1).numpy() - expected)
        assert difference.max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_keep_their_digits_in_half_precision(dtype: torch.dtype) -> None:
    """A bias of a late position has more digits than the type; its neighbours' differ by one
    slope all the same."""
    inputs = random_inputs(batch=1, num_heads=4, num_kv_heads=2, length=700, dim=8).to(dtype)
    variant = Variant(4, alibi="bloom", scales=0.3)
    output, _ = both(variant, inputs.last(4))
    expected = variant.expected(*inputs.last(4).row(0)).output
    assert output.dtype == dtype
    assert np.abs(output[0].transpose(0, 1).double().numpy() - expected).max() <= 0.02


# Names


def test_auto_is_a_kernel_and_names_stay_as_they_are() -> None:
    assert resolve_kernel("auto") in KERNELS
    assert [resolve_kernel(name) for name in KERNELS] == list(KERNELS)
    assert get_kernel("dense") is not get_kernel("reference")


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    unknown: KernelName = "flash"  # type: ignore[assignment]
    for use in (
        lambda: resolve_kernel(unknown),
        lambda: get_kernel(unknown),
        lambda: Transformer(tiny.llama(), kernel=unknown),
    ):
        with pytest.raises(ConfigError) as caught:
            use()
        assert caught.value.field == "kernel"
        assert str(caught.value) == "kernel is 'flash'; allowed: auto, dense, reference"
