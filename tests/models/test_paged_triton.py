"""Attention in Triton agrees with the definition; on machines without a GPU through Triton's
interpreter, which computes what a GPU would, slowly."""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from models.attention_metadata import GroupMetadata
from models.config import HeadConfig
from models.errors import ConfigError
from models.gpu.availability import why_unavailable
from models.kernels import paged_triton, resolve_kernel
from models.kernels.paged_triton import partial_bytes
from models.positions import Alibi
from tests.models import tiny
from tests.models.batches import EVERYTHING, Case, make_batch
from tests.models.kernels import CPU, computes
from tests.models.variants import EACH_HEAD, PLAIN, Variant, variants

HEADS = HeadConfig(4, 2, 8)
# The lock file has it: what is skipped elsewhere runs where all that the tests need is installed.
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, Variant]:
    decodes = draw(st.lists(st.tuples(st.integers(0, 40), st.just(1)), max_size=2))
    chunks = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(2, 20)), max_size=1))
    case = Case(
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 5)),
        head_dim=draw(st.sampled_from([1, 3, 16, 24])),
        block_size=draw(st.sampled_from([1, 3, 16, 64])),
        sequences=(*decodes, *chunks) or ((30, 1),),
        seed=draw(st.integers(0, 2**16)),
    )
    return case, draw(variants(case.num_kv_heads * case.group))


# More than one span of keys, and more than one tile of queries.
LONG = Case(1, 20, 16, 16, ((1030, 1), (0, 1), (511, 1), (512, 1), (500, 30)), seed=1)
PLAIN20 = replace(PLAIN, num_heads=20, scales=0.25)


@needs_triton
@settings(max_examples=40)
@given(varied=cases())
@example(varied=(EVERYTHING, PLAIN))
@example(varied=(EVERYTHING, EACH_HEAD))
@example(varied=(LONG, PLAIN20))
@example(varied=(LONG, replace(PLAIN20, window=40, sink_tokens=5, sinks=(0.5,) * 20)))
def test_it_equals_the_definition(varied: tuple[Case, Variant]) -> None:
    case, variant = varied
    assert computes("paged_triton", LONG, PLAIN20, torch.float32), "these examples run here"
    assume(computes("paged_triton", case, variant, torch.float32))
    batch = make_batch(case, torch.float32)
    error = (batch.run("paged_triton", variant) - batch.run("reference", variant)).abs().max()
    assert error <= 4e-6


@needs_triton
@settings(max_examples=15)
@given(varied=cases())
@example(varied=(EVERYTHING, EACH_HEAD))
def test_in_float16_it_errs_at_most_twice_as_much_as_eager_attention(
    varied: tuple[Case, Variant],
) -> None:
    """Triton's interpreter has no bfloat16."""
    case, variant = varied
    assume(computes("paged_triton", case, variant, torch.float16))
    batch = make_batch(case, torch.float16)
    output, eager = batch.run("paged_triton", variant), batch.run("reference", variant)
    for span, key, value in zip(batch.spans, batch.keys, batch.values, strict=True):
        query = batch.query[span].double().numpy()
        exact = variant.expected(query, key.double().numpy(), value.double().numpy()).output
        theirs = np.abs(eager[span].double().numpy() - exact).max()
        ours = np.abs(output[span].double().numpy() - exact).max()
        assert ours <= max(2 * theirs, 2**-10 * value.abs().max().item())


@needs_triton
def test_stale_content_behind_a_sequence_changes_nothing() -> None:
    clean = make_batch(EVERYTHING, torch.float32).run("paged_triton", EACH_HEAD)
    stale = make_batch(EVERYTHING, torch.float32, stale=1e30).run("paged_triton", EACH_HEAD)
    assert torch.equal(stale, clean)


@needs_triton
def test_a_sequence_reads_the_same_alone_and_among_others() -> None:
    """Spans lie where they lie, however long the others are."""
    together = make_batch(LONG, torch.float32)
    metadata = GroupMetadata(together.metadata._rows[:1], LONG.block_size, CPU, None)
    alone = replace(together, query=together.query[:1], metadata=metadata)
    assert torch.equal(
        alone.run("paged_triton", PLAIN20), together.run("paged_triton", PLAIN20)[:1]
    )


@needs_triton
def test_greedy_tokens_are_those_of_the_definition() -> None:
    config = tiny.llama(layers=(HEADS, replace(HEADS, window=9)))
    tokens = [torch.arange(seed, 24 + seed) % 60 for seed in (1, 2)]
    steps = [[13, 13], [9, 1], *[[1, 1]] * 2, [0, 8]]
    found, expected = (
        tiny.paged_logits(tiny.model(config, kernel=kernel), tokens, steps)
        for kernel in ("paged_triton", "reference")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("heads", "dtype", "reason"),
    [
        (HEADS, torch.float64, "the type is float64"),
        (HeadConfig(4, 2, 272), torch.float32, "head_dim is 272"),
        (HeadConfig(4, 2, 8, causal=False), torch.float32, "the heads are not causal"),
        (
            HeadConfig(2, 2, 8, alibi=Alibi((0.5, 0.25), bfloat16=True)),
            torch.float32,
            "the position bias is rounded to bfloat16",
        ),
    ],
)
def test_what_it_cannot_compute_is_left_to_another(
    heads: HeadConfig, dtype: torch.dtype, reason: str
) -> None:
    where = torch.device("cuda")
    assert paged_triton.why_unsupported(heads, dtype, where) == reason
    assert resolve_kernel("auto", heads, dtype, where) == "dense"
    with pytest.raises(ConfigError, match=f"because {reason}"):
        resolve_kernel("paged_triton", heads, dtype, where)


@needs_triton
def test_many_tiles_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of chunks over a long past, what the spans leave would take gigabytes at once."""
    case = replace(LONG, sequences=((0, 1), (300, 70), (0, 90), (511, 60)))
    batch = make_batch(case, torch.float32)
    sinks = replace(PLAIN20, sinks=(0.5,) * 20)
    whole = batch.run("paged_triton", sinks)
    assert partial_bytes(HeadConfig(20, 1, 16), 64, 1100) == 64 * 5 * 32 * 18 * 4
    monkeypatch.setattr(paged_triton, "_PARTIAL_BYTES", 1)
    assert torch.equal(batch.run("paged_triton", sinks), whole)
    assert partial_bytes(HeadConfig(20, 1, 16), 64, 1100) == 4 * 5 * 32 * 18 * 4


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    """What a machine has is looked at once."""
    why_unavailable.cache_clear()
    yield
    why_unavailable.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's only programs, gcc among them, and Python's headers beside them."""
    gcc = tmp_path / "gcc"
    gcc.touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_config_var", {"INCLUDEPY": str(tmp_path)}.get)
    return gcc


@needs_triton
def test_without_a_compiler_or_headers_a_gpu_is_left_to_another(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")

    def refused(because: str) -> None:
        why_unavailable.cache_clear()
        with pytest.raises(ConfigError, match=because):
            resolve_kernel("paged_triton", HEADS, torch.bfloat16, gpu)

    monkeypatch.setenv("CC", "our-cc")
    refused("because Triton needs a C compiler; there is no our-cc")
    monkeypatch.delenv("CC")
    compiler.with_name("Python.h").unlink()
    refused(r"because Triton needs .*/Python.h \(python3-dev\)")
    compiler.unlink()
    refused("because Triton needs a C compiler; there is no gcc or clang")
    # Its interpreter compiles nothing.
    assert resolve_kernel("paged_triton", HEADS, torch.float32, CPU) == "paged_triton"


@needs_triton
@pytest.mark.usefixtures("compiler")
def test_a_gpu_that_cannot_run_it_is_left_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.gpu.launch import launch_options  # needs Triton

    gpu = torch.device("cuda")

    def reason() -> str | None:
        why_unavailable.cache_clear()
        return paged_triton.why_unsupported(HEADS, torch.bfloat16, gpu)

    assert reason() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, expected in (
        ((7, 5), "the GPU's compute capability is 7.5, below 8.0"),
        ((8, 0), None),
        ((9, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, f=found: f)
        launch_options.cache_clear()
        assert reason() == expected
        assert launch_options(gpu)["overlaps"] == (found == (9, 0))
    launch_options.cache_clear()
    assert launch_options(CPU) == {"overlaps": False}
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason() == "the GPU is not one of NVIDIA's"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "triton.language.extra.cuda", ModuleType("older"))
    assert reason() == "Triton is too old: its kernels cannot wait for each other"


@needs_triton
@pytest.mark.usefixtures("compiler")
def test_it_is_what_auto_means_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert resolve_kernel("auto", HEADS, dtype, gpu) == "paged_triton"
    assert resolve_kernel("auto", HEADS, torch.float64, gpu) == "dense"
    assert resolve_kernel("auto", HEADS, torch.float32, CPU) != "paged_triton"
    with pytest.raises(ConfigError, match="multiplies the bits of bfloat16"):
        resolve_kernel("paged_triton", HEADS, torch.bfloat16, CPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert paged_triton.why_unsupported(HEADS, torch.float32, CPU) == "the device is cpu"


def test_without_triton_another_kernel_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is not installed"):
        resolve_kernel("paged_triton", HEADS, torch.float32, CPU)
