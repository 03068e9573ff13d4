"""The kernel in C++: its bits depend on nothing but the sequence."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.attention_metadata import AttentionMetadata
from models.config import HeadConfig, KVCacheDType
from models.cpu.library import why_unavailable
from models.errors import ConfigError
from models.kernels import get_kernel, resolve_kernel
from models.kernels.paged_cpu import why_unsupported
from models.kv_cache import KVCache
from models.positions import Alibi, RopeConfig, alibi_slopes
from models.query_batch import RELEASED
from models.scoring import Scoring
from tests.models import tiny
from tests.models.batches import EVERYTHING, make_batch
from tests.models.cpu.units import UNITS, multiplying_by
from tests.models.kernels import CPU, needs_library
from tests.models.variants import PLAIN

PLAIN_HEADS = HeadConfig(4, 2, 8, rope=RopeConfig(10_000.0, 8))
ROUNDED = Alibi(alibi_slopes(4), before_scale=True, bfloat16=True)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Kind(TypedDict, total=False):
    """Types of computation and cache."""

    dtype: torch.dtype
    kv_cache_dtype: KVCacheDType


@dataclass(frozen=True)
class Sequences:
    """Queries, keys and values of some sequences, `[tokens, heads or kv_heads, head_dim]` each."""

    heads: HeadConfig
    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]

    @staticmethod
    def random(heads: HeadConfig, lengths: Sequence[int], *, seed: int = 0) -> "Sequences":
        generator = torch.Generator().manual_seed(seed)

        def normal(length: int, num_heads: int) -> Tensor:
            return torch.randn(length, num_heads, heads.head_dim, generator=generator)

        return Sequences(
            heads,
            [normal(length, heads.num_heads) for length in lengths],
            [normal(length, heads.num_kv_heads) for length in lengths],
            [normal(length, heads.num_kv_heads) for length in lengths],
        )

    def only(self, index: int) -> "Sequences":
        part = slice(index, index + 1)
        return Sequences(self.heads, self.query[part], self.key[part], self.value[part])

    def read(
        self,
        scoring: Scoring,
        steps: Sequence[Sequence[int]],
        *,
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: KVCacheDType = "auto",
        block_size: int = 16,
        seed: int = 0,
    ) -> list[Tensor]:
        """What each sequence reads `[tokens, heads, head_dim]`, computed in steps.

        Memory that holds no key is not a number, and becomes it again when it is given back.

        Args:
            steps: for each step, how many tokens of each sequence are computed in it.
        """
        lengths = [len(query) for query in self.query]
        blocks_each = [-(-length // block_size) for length in lengths]
        blocks = torch.randperm(sum(blocks_each) + 2, generator=torch.Generator().manual_seed(seed))
        own = iter(blocks.tolist())
        tables = [[next(own) for _ in range(count)] for count in blocks_each]
        cache = KVCache(
            tiny.gpt2(layers=(self.heads,), kv_cache_dtype=kv_cache_dtype),
            num_pages=len(blocks),
            block_size=block_size,
            dtype=dtype,
            device=CPU,
        )
        # Of 8 bits, these are the bits of scales that are no numbers.
        cache.pool.fill_(-1 if kv_cache_dtype == "int8" else torch.nan)
        ((part,),) = cache.layers
        computed = [0] * len(lengths)
        outputs: list[list[Tensor]] = [[] for _ in lengths]
        for counts in steps:
            order = sorted((i for i, n in enumerate(counts) if n), key=lambda i: counts[i] != 1)
            metadata = AttentionMetadata.build(
                block_tables=[[tables[i]] for i in order],
                num_computed_tokens=[computed[i] for i in order],
                num_new_tokens=[counts[i] for i in order],
                block_size=block_size,
                device=CPU,
            ).groups[0]

            def packed(
                of: list[Tensor], order: list[int] = order, counts: Sequence[int] = counts
            ) -> Tensor:
                return torch.cat([of[i][computed[i] :][: counts[i]] for i in order]).to(dtype)

            part.write(packed(self.key), packed(self.value), metadata.slot_mapping)
            output = get_kernel("paged_cpu")(packed(self.query), part, metadata, scoring)
            for i, rows in zip(order, output.split([counts[i] for i in order]), strict=True):
                outputs[i].append(rows)
                computed[i] += counts[i]
                gone = -1 if scoring.window is None else computed[i] - _widest(scoring) + 1
                for at, block in enumerate(tables[i]):
                    left = (at + 1) * block_size <= gone and at * block_size >= scoring.sink_tokens
                    if left and block != RELEASED:
                        slots = torch.arange(block * block_size, (block + 1) * block_size)
                        poison = torch.full_like(self.key[i][:1], torch.nan, dtype=dtype)
                        poison = poison.expand(block_size, -1, -1)
                        part.write(poison, poison, slots)
                        tables[i][at] = RELEASED
        assert computed == lengths, "the steps must cover all tokens"
        return [torch.cat(rows) for rows in outputs]


def _widest(scoring: Scoring) -> int:
    windows = scoring.window if isinstance(scoring.window, tuple) else (scoring.window,)
    return max(2**31 if window is None else window for window in windows)


def assert_equal_bits(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


# Its bits


SCORINGS = {
    "plain": Scoring(0.3),
    "window": Scoring(0.3, window=100),
    "windows": Scoring(0.3, window=(40, 70, 100, 130, 1, 16), sink_tokens=20),
    "everything": Scoring(
        torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        window=(40, None, 100, 130, 1, 16),
        softcap=3.0,
        alibi=Alibi(alibi_slopes(6)),
        sinks=torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, 0.5]),
    ),
}
DTYPES = [torch.float32, torch.bfloat16]
KINDS: dict[str, Kind] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "8 bits": {"dtype": torch.bfloat16, "kv_cache_dtype": "int8"},
}


BY_UNITS = [("float32", "vectors"), *itertools.product(("bfloat16", "8 bits"), UNITS)]


@needs_library
@pytest.mark.parametrize(("kind", "unit"), BY_UNITS)
@pytest.mark.parametrize("name", SCORINGS)
@settings(max_examples=20)
@given(data=st.data())
def test_the_bits_of_a_sequence_depend_on_itself_alone(
    name: str, kind: str, unit: str, data: st.DataObject
) -> None:
    """Whatever else is in a step, however a prompt is cut, and wherever its blocks lie."""
    head_dim = data.draw(st.sampled_from([4, 20, 32, 40, 64, 96, 256]))
    heads = HeadConfig(6, data.draw(st.sampled_from([1, 2, 3, 6])), head_dim)
    lengths = data.draw(st.lists(st.integers(1, 330), min_size=1, max_size=4))
    sequences = Sequences.random(heads, lengths)
    left, steps = list(lengths), list[list[int]]()
    while any(left):
        sizes = st.sampled_from([0, 1, 3, 17, 48, 64, 65, 200, 330])
        counts = [min(data.draw(sizes), count) for count in left]
        counts = counts if any(counts) and len(steps) < 8 else list(left)
        steps.append(counts)
        left = [before - now for before, now in zip(left, counts, strict=True)]
    block_size = data.draw(st.sampled_from([1, 3, 16, 48, 64]))
    with multiplying_by(unit):
        read = sequences.read(SCORINGS[name], steps, **KINDS[kind], block_size=block_size, seed=1)
        for index, length in enumerate(lengths):
            alone = sequences.only(index).read(SCORINGS[name], [[length]], **KINDS[kind])
            assert_equal_bits(read[index : index + 1], alone)


@needs_library
@pytest.mark.parametrize(("kind", "unit"), BY_UNITS)
@pytest.mark.parametrize("name", SCORINGS)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 24), (2, 40), (1, 64), (2, 64), (6, 64)])
def test_token_by_token_equals_one_shot(
    name: str, kind: str, unit: str, kv_heads: int, head_dim: int
) -> None:
    """Blocks behind the windows are given back on the way and turned into what is not a number."""
    sequences = Sequences.random(HeadConfig(6, kv_heads, head_dim), [330])
    with multiplying_by(unit):
        one_shot = sequences.read(SCORINGS[name], [[330]], **KINDS[kind])
        by_one = sequences.read(SCORINGS[name], [[1]] * 330, **KINDS[kind])
    assert_equal_bits(by_one, one_shot)


@needs_library
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCORINGS)
def test_threads_and_spans_change_no_bit(
    name: str, kind: str, set_threads: Callable[[int], None]
) -> None:
    """A step with fewer tasks than four for each thread is cut into spans of keys: a long sequence
    alone is, and one among forty others is not."""
    long = 1100
    sequences = Sequences.random(HeadConfig(6, 1, 32), [long, *[5] * 40])
    others = [5] * 40
    for steps in (
        [[long, *others]],
        [[long - 1, *[4] * 40], [1] * 41],
        [[long - 1, *[0] * 40], [1, *[0] * 40], [0, *others]],
    ):
        outputs: list[list[Tensor]] = []
        for num_threads in (1, 2, 3):
            set_threads(num_threads)
            outputs.append(sequences.read(SCORINGS[name], steps, **KINDS[kind]))
        set_threads(1)
        alone = sequences.only(0).read(SCORINGS[name], [[long - 1], [1]], **KINDS[kind])
        for output in outputs:
            assert_equal_bits(output, outputs[0])
            assert_equal_bits(output[:1], alone)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_may_lie_anywhere(dtype: torch.dtype) -> None:
    """A view of a wider matrix, or with heads before tokens."""
    batch = make_batch(EVERYTHING, dtype)
    expected = batch.run("paged_cpu", PLAIN)
    wide = torch.full((*batch.query.shape[:2], 20), torch.nan, dtype=dtype)
    wide[..., 3:11] = batch.query
    by_heads = batch.query.transpose(0, 1).contiguous().transpose(0, 1)
    for query in (wide[..., 3:11], by_heads):
        assert not query.is_contiguous()
        assert torch.equal(replace(batch, query=query).run("paged_cpu", PLAIN), expected)


# What is not a number


@needs_library
@pytest.mark.parametrize("heads", [HeadConfig(6, 2, 16), HeadConfig(6, 1, 64)], ids=["16", "64"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCORINGS)
@settings(max_examples=10)
@given(data=st.data())
@example(data=None)
def test_a_query_that_is_not_a_number_spoils_its_own_row_only(
    name: str, kind: str, heads: HeadConfig, data: st.DataObject | None
) -> None:
    lengths = [700, 90, 3]
    steps = [[690, 80, 2], [1, 1, 1], [9, 9, 0]]
    sequences = Sequences.random(heads, lengths)
    clean = sequences.read(SCORINGS[name], steps, **KINDS[kind])
    chosen, head, at, element = (
        (data.draw(st.integers(0, most)) for most in (2, 5, 699, 15)) if data else (0, 4, 690, 0)
    )
    token = at % lengths[chosen]
    sequences.query[chosen][token, head, element] = torch.nan
    outputs = sequences.read(SCORINGS[name], steps, **KINDS[kind])
    assert outputs[chosen][token, head].isnan().all()
    outputs[chosen][token, head] = clean[chosen][token, head]
    assert_equal_bits(outputs, clean)


# Where it runs


@pytest.mark.parametrize(
    ("heads", "dtype", "device", "reason"),
    [
        (PLAIN_HEADS, torch.float32, "meta", "the device is meta"),
        (PLAIN_HEADS, torch.float16, "cpu", "the type is float16"),
        (PLAIN_HEADS, torch.float64, "cpu", "the type is float64"),
        (HeadConfig(4, 2, 258), torch.float32, "cpu", "head_dim is 258"),
        (HeadConfig(4, 2, 7), torch.bfloat16, "cpu", "head_dim is 7"),
        (HeadConfig(4, 2, 8, causal=False), torch.float32, "cpu", "the heads are not causal"),
        (
            HeadConfig(4, 2, 8, alibi=ROUNDED),
            torch.float32,
            "cpu",
            "the position bias is rounded to bfloat16",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_compute_is_left_to_another(
    heads: HeadConfig, dtype: torch.dtype, device: str, reason: str
) -> None:
    where = torch.device(device)
    assert why_unsupported(heads, dtype, where) == reason
    assert resolve_kernel("auto", heads, dtype, where) == "dense"
    with pytest.raises(ConfigError) as caught:
        resolve_kernel("paged_cpu", heads, dtype, where)
    assert caught.value.field == "kernel"
    assert str(caught.value).endswith(f"; allowed: auto, dense, reference, because {reason}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads",
    [
        HeadConfig(4, 2, 256),
        HeadConfig(21, 1, 6, window=5, sink_tokens=3, softcap=2.0, learned_sinks=True),
        HeadConfig(4, 4, 2, window=(1, None, 3, 4), alibi=Alibi(alibi_slopes(4))),
    ],
)
def test_the_rest_is_computed_wherever_it_runs(heads: HeadConfig, dtype: torch.dtype) -> None:
    assert why_unsupported(heads, dtype, CPU) == why_unavailable()
    assert why_unsupported(HeadConfig(4, 2, 7), torch.float32, CPU) == why_unavailable()


@needs_library
def test_each_layer_has_the_kernel_that_can_compute_it() -> None:
    rounded = HeadConfig(4, 2, 8, alibi=ROUNDED)
    config = tiny.llama(layers=(PLAIN_HEADS, rounded, PLAIN_HEADS))
    model = tiny.model(config)
    assert model.kernel_name == "paged_cpu+dense"
    tokens = torch.arange(30)
    (logits,) = tiny.paged_logits(model, [tokens], [[20], *[[1]] * 10])
    assert (logits - model.logits(tokens[None])[0]).abs().max() <= 1e-5
    assert model.double().kernel_name == "dense"
    with pytest.raises(ConfigError, match="the position bias is rounded to bfloat16"):
        _ = tiny.model(config, kernel="paged_cpu").kernel_name


@needs_library
def test_greedy_tokens_are_those_of_the_definition() -> None:
    """Three sequences of a tiny model that generate together, each step by the whole batch."""
    config = tiny.llama(layers=(PLAIN_HEADS, replace(PLAIN_HEADS, window=9)))
    generated: list[list[list[int]]] = []
    for kernel in ("paged_cpu", "reference"):
        model = tiny.model(config, kernel=kernel)
        assert model.kernel_name == kernel
        sequences = [[seed, *range(seed, 20 + seed)] for seed in (1, 2, 3)]
        for _ in range(20):
            tokens = [torch.tensor(sequence) for sequence in sequences]
            steps = [[13] * 3, *[[1] * 3] * (len(tokens[0]) - 13)]
            logits = tiny.paged_logits(model, tokens, steps)
            for sequence, rows in zip(sequences, logits, strict=True):
                sequence.append(int(rows[-1].argmax()))
        generated.append(sequences)
    assert generated[0] == generated[1]
    assert len({*generated[0][0][21:]}) > 3, "a token over and over again proves nothing"


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_tables": torch.zeros(7, 1, dtype=torch.int32)}, "tokens and 1 blocks"),
        ({"block_tables": torch.full((7, 9), 10**6, dtype=torch.int32)}, "block 1000000 of"),
        ({"block_tables": torch.full((7, 9), -2, dtype=torch.int32)}, "block -2 of"),
        ({"block_tables": torch.zeros(6, 9, dtype=torch.int32)}, "for each sequence"),
        ({"num_computed": torch.full((7,), -1, dtype=torch.int32)}, "sequence 0"),
        ({"query_start": torch.arange(8, dtype=torch.int32)}, "all queries are of a sequence"),
    ],
)
def test_tables_that_lead_out_of_the_cache_are_refused(
    change: dict[str, Tensor], message: str
) -> None:
    """What the operation reads, it reads without looking."""
    batch = make_batch(EVERYTHING, torch.float32)
    wrong = replace(batch.metadata.block_tables, **change)
    vars(batch.metadata)["block_tables"] = wrong
    with pytest.raises(RuntimeError, match=message):
        batch.run("paged_cpu", PLAIN)
