"""Products, norms and gates in Triton, by its interpreter: what torch does in steps."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import silu

from models.before import Before
from models.gpu import fused
from models.layers import Gate, RMSNorm, rms_norm
from models.linear import Linear
from tests.models import tiny

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
EPS = 1e-5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, exact: Tensor) -> bool:
    """Up to some roundings of the largest number."""
    allowed = 8 * torch.finfo(ours.dtype).eps * exact.abs().max().clamp(min=1)
    return bool((ours.double() - exact).abs().max() <= allowed)


@settings(max_examples=30)
@given(
    rows=st.integers(1, fused.MAX_ROWS),
    outputs=st.sampled_from([1, 5, 16, 37, 1300, 2600]),
    inputs=st.sampled_from([1, 100, 256, 512, 1300, 2500]),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_a_product_with_few_rows(
    rows: int,
    outputs: int,
    inputs: int,
    bias: bool,
    residual: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    x = random(rows, inputs, seed=seed).to(dtype)
    weight = (random(outputs, inputs, seed=seed + 1) * inputs**-0.5).to(dtype)
    added = random(rows, outputs, seed=seed + 2).to(dtype) if residual else None
    constant = random(outputs, seed=seed + 3).to(dtype) if bias else None
    exact = x.double() @ weight.double().T
    for part in (added, constant):
        exact = exact if part is None else exact + part.double()
    assert close(fused.multiply(weight, x, constant, residual=added), exact)


@settings(max_examples=20)
@given(
    outputs=st.sampled_from([40, 1300, 5200]),
    inputs=st.sampled_from([1, 100, 600, 2500]),
    swiglu=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_one_row_is_normed_or_gated_before(
    outputs: int, inputs: int, swiglu: bool, seed: int
) -> None:
    x = random(1, 2 * inputs if swiglu else inputs, seed=seed)
    weight = random(outputs, inputs, seed=seed + 1) * inputs**-0.5
    norm, residual = random(inputs, seed=seed + 2), random(1, outputs, seed=seed + 3)
    if swiglu:
        before = Before(swiglu=True)
        gate, value = x.double().chunk(2, dim=-1)
        rows = silu(gate) * value
    else:
        before = Before(norm=norm, eps=EPS)
        rows = torch_rms_norm(x.double(), (inputs,), norm.double(), EPS)
    exact = rows @ weight.double().T + residual
    assert close(fused.multiply(weight, x, before=before, residual=residual), exact)


@settings(max_examples=20)
@given(
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 3, 64, 1500]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**16),
)
def test_norms_and_gates(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x = random(rows, 2 * width, seed=seed).to(dtype)
    gate, value = x.double().chunk(2, dim=-1)
    assert close(fused.silu_mul(x), silu(gate) * value)
    weight = random(width, seed=seed + 1).to(dtype)
    for part in (x[:, :width], x[:, :width].contiguous()):
        exact = torch_rms_norm(part.double(), (width,), weight.double(), EPS)
        assert close(fused.rms_norm(part, weight, EPS), exact)


def test_what_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without gradients, of one type, on a GPU, where Triton runs."""
    ones = torch.ones(2, 4)
    assert not fused.can_fuse(ones), "not on a processor"
    gpu = torch.device("cuda")

    class OnGPU:
        device = gpu
        dtype = torch.bfloat16
        shape = (2, 4)

        def numel(self) -> int:
            return 8

        def is_contiguous(self) -> bool:
            return self.dtype is torch.bfloat16

    class Other(OnGPU):
        dtype = torch.float16

    class Wide(OnGPU):
        dtype = torch.float64

    there, other, wide = OnGPU(), Other(), Wide()
    monkeypatch.setattr(fused, "why_unavailable", lambda device: None)
    assert not fused.can_fuse(there), "gradients are asked for"  # type: ignore[arg-type]
    with torch.no_grad():
        assert fused.can_fuse(there, there)  # type: ignore[arg-type]
        assert not fused.can_fuse(there, other)  # type: ignore[arg-type]
        assert not fused.can_fuse(wide, wide)  # type: ignore[arg-type]
        assert fused.can_multiply(there, there)  # type: ignore[arg-type]
        assert not fused.can_multiply(other, other), "rows of the weight lie elsewhere"  # type: ignore[arg-type]
        monkeypatch.setattr(fused, "MAX_ROWS", 1)
        assert not fused.can_multiply(there, there)  # type: ignore[arg-type]
        monkeypatch.setattr(fused, "why_unavailable", lambda device: "no compiler")
        assert not fused.can_fuse(there, there)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_layers_use_them(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a GPU; a norm or a gate is part of the product of one row only."""
    monkeypatch.setattr("models.cpu.fused.why_unavailable", lambda: "another processor")
    calls: list[str] = []
    linear, norm, gate = Linear(24, 40, bias=True), RMSNorm(24, EPS), Gate("silu")
    norm.weight.copy_(random(24, seed=1))
    x, doubled, residual = (
        random(rows, 24, seed=2),
        random(rows, 48, seed=3),
        random(rows, 40, seed=4),
    )
    plain = [linear(x, norm, residual), linear(doubled, gate), linear(x), linear(x, None, residual)]
    for name in ("multiply", "rms_norm", "silu_mul"):
        function = getattr(fused, name)

        def counted(
            *args: object, name: str = name, function: object = function, **kwargs: object
        ) -> object:
            calls.append(name)
            return function(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(fused, name, counted)
    monkeypatch.setattr(fused, "can_fuse", lambda *tensors: True)
    ours = [linear(x, norm, residual), linear(doubled, gate), linear(x), linear(x, None, residual)]
    for one, other in zip(ours, plain, strict=True):
        assert (one - other).abs().max() <= 1e-5
    alone = ["multiply"] * 4
    steps = ["rms_norm", "multiply", "silu_mul", "multiply", "multiply", "multiply"]
    assert calls == (alone if rows == 1 else steps)
    assert torch.equal(rms_norm(x, norm.weight, EPS), fused.rms_norm(x, norm.weight, EPS))


@torch.no_grad()
def test_the_head_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of embeddings that are tied, and of those that are not."""
    for tied in (True, False):
        model = tiny.model(tiny.llama(tie_word_embeddings=tied))
        hidden = random(2, model.config.hidden_size, seed=1)
        plain = model.project_to_vocab(hidden)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "can_fuse", lambda *tensors: True)
            assert (model.project_to_vocab(hidden) - plain).abs().max() <= 1e-5
