"""The module is torch.nn.MultiheadAttention, with every option, in both implementations."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import masks
from models.multihead import Implementation, MultiheadAttention

MaskKind = Literal["bool", "float", "bool of each head", "float of each head", "causal"]
PaddingKind = Literal["bool", "float"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


@dataclass(frozen=True)
class Case:
    """Everything that torch's module can be asked, but dropout; `batch` None is unbatched."""

    num_heads: int = 4
    head_dim: int = 8
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = False
    batch: int | None = 2
    queries: int = 5
    keys: int = 7
    is_self: bool = False
    attn_mask: MaskKind | None = None
    padding: PaddingKind | None = None
    need_weights: bool = True
    average: bool = True
    is_causal: bool = False
    seed: int = 0

    def make(self, cls: type[nn.Module], dtype: torch.dtype) -> nn.Module:
        module = cls(
            self.num_heads * self.head_dim,
            self.num_heads,
            bias=self.bias,
            add_bias_kv=self.add_bias_kv,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            dtype=dtype,
        )
        return module.eval()

    def modules(self, dtype: torch.dtype) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
        """Theirs, with biases and scores that are felt, and ours with its weights."""
        theirs, ours = (
            self.make(cls, dtype) for cls in (nn.MultiheadAttention, MultiheadAttention)
        )
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                spread = 1 / math.sqrt(parameter.shape[-1]) if "weight" in name else 0.5
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(spread * values)
        ours.load_state_dict(theirs.state_dict())
        assert isinstance(theirs, nn.MultiheadAttention)
        assert isinstance(ours, MultiheadAttention)
        return theirs, ours

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(tokens: int, width: int | None) -> Tensor:
            shape = [tokens, width or self.num_heads * self.head_dim]
            if self.batch is not None:
                shape.insert(0 if self.batch_first else 1, self.batch)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        query = draw(self.queries, None)
        if self.is_self:
            return query, query, query
        return query, draw(self.keys, self.kdim), draw(self.keys, self.vdim)

    def masks(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """`attn_mask` and `key_padding_mask`; everybody sees key 0, so that torch has no NaN."""
        generator = torch.Generator().manual_seed(self.seed + 2)

        def draw(kind: str, *shape: int) -> Tensor:
            hidden = torch.rand(shape, generator=generator) < 0.4
            hidden[..., 0] = False
            if kind.startswith("bool"):
                return hidden
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return values.masked_fill(hidden, -math.inf)

        attn_mask: Tensor | None = None
        if self.attn_mask == "causal":
            attn_mask = ~torch.ones(self.queries, self.keys, dtype=torch.bool).tril()
        elif self.attn_mask is not None:
            rows = (self.batch or 1) * self.num_heads
            each = (rows,) if self.attn_mask.endswith("of each head") else ()
            attn_mask = draw(self.attn_mask, *each, self.queries, self.keys)
        padding: Tensor | None = None
        if self.padding is not None:
            shape = (self.keys,) if self.batch is None else (self.batch, self.keys)
            padding = draw(self.padding, *shape)
        return attn_mask, padding

    def run(self, module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        attn_mask, padding = self.masks(dtype)
        result: tuple[Tensor, Tensor | None] = module(
            *self.inputs(dtype),
            key_padding_mask=padding,
            need_weights=self.need_weights,
            attn_mask=attn_mask,
            average_attn_weights=self.average,
            is_causal=self.is_causal,
        )
        return result


@st.composite
def cases(draw: st.DrawFn) -> Case:
    is_self = draw(st.booleans())
    queries = draw(st.integers(1, 6))
    mask = draw(st.none() | st.sampled_from(get_args(MaskKind)))
    padding = draw(st.none() | st.sampled_from(get_args(PaddingKind)))
    need_weights = draw(st.booleans())
    add_bias_kv, add_zero_attn = draw(st.booleans()), draw(st.booleans())
    # Without weights, torch's hint hides the appended keys too: see the test of `is_causal`.
    hint_is_safe = need_weights or padding is not None or not (add_bias_kv or add_zero_attn)
    return Case(
        num_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([1, 2, 3, 8])),
        bias=draw(st.booleans()),
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        kdim=None if is_self else draw(st.none() | st.integers(1, 9)),
        vdim=None if is_self else draw(st.none() | st.integers(1, 9)),
        batch_first=draw(st.booleans()),
        batch=draw(st.none() | st.integers(1, 3)),
        queries=queries,
        keys=queries if is_self else draw(st.integers(1, 7)),
        is_self=is_self,
        attn_mask=mask,
        padding=padding,
        need_weights=need_weights,
        average=draw(st.booleans()),
        is_causal=mask == "causal" and hint_is_safe and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


EVERYTHING = Case(
    add_bias_kv=True,
    add_zero_attn=True,
    kdim=5,
    vdim=6,
    attn_mask="float of each head",
    padding="bool",
    average=False,
)
PLAIN_SELF_ATTENTION = Case(batch_first=True, is_self=True, queries=6, keys=6)


def assert_close(ours: Tensor | None, theirs: Tensor | None, bar: float) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= bar * theirs.abs().max().clamp_min(1)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=250)
@given(case=cases())
@example(case=EVERYTHING)
@example(case=replace(EVERYTHING, batch_first=True, batch=None, need_weights=False))
@example(case=PLAIN_SELF_ATTENTION)
@example(case=replace(PLAIN_SELF_ATTENTION, attn_mask="causal", is_causal=True, padding="float"))
def test_outputs_and_weights_are_torchs(
    implementation: Implementation, dtype: torch.dtype, bar: float, case: Case
) -> None:
    theirs, ours = case.modules(dtype)
    ours.implementation = implementation
    with torch.no_grad():  # theirs then has a fast path for plain self-attention
        expected = case.run(theirs, dtype)
        got = case.run(ours, dtype)
    for mine, other in zip(got, expected, strict=True):
        assert_close(mine, other, bar)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
@example(case=EVERYTHING)
@example(case=replace(EVERYTHING, need_weights=False))
def test_gradients_are_torchs(implementation: Implementation, case: Case) -> None:
    theirs, ours = case.modules(torch.float64)
    ours.implementation = implementation
    attn_mask, padding = case.masks(torch.float64)
    found: list[dict[str, Tensor]] = []
    for module in (theirs, ours):
        inputs = dict(zip("qkv", case.inputs(torch.float64), strict=True))
        leaves = {name: part.clone().requires_grad_() for name, part in inputs.items()}
        if case.is_self:
            leaves["k"] = leaves["v"] = leaves["q"]
        if attn_mask is not None and attn_mask.is_floating_point():
            leaves["mask"] = attn_mask.clone().requires_grad_()
        output, weights = module(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            key_padding_mask=padding,
            need_weights=case.need_weights,
            attn_mask=leaves.get("mask", attn_mask),
            average_attn_weights=case.average,
        )
        loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
        if weights is not None:
            loss = loss + (weights * torch.linspace(-2, 3, weights.numel()).view_as(weights)).sum()
        loss.backward()
        leaves |= dict(module.named_parameters())
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    expected, got = found
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert (gradient - expected[name]).abs().max() <= 1e-12 * (1 + expected[name].abs().max())


@pytest.mark.parametrize("add_bias_kv", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (5, None), (None, 6), (32, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_go_both_ways_and_a_seed_gives_the_same(
    bias: bool, kdim: int | None, vdim: int | None, add_bias_kv: bool
) -> None:
    case = Case(bias=bias, kdim=kdim, vdim=vdim, add_bias_kv=add_bias_kv)
    torch.manual_seed(1)
    theirs = case.make(nn.MultiheadAttention, torch.float32)
    torch.manual_seed(1)
    ours = case.make(MultiheadAttention, torch.float32)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_it_stands_in_torchs_own_layers() -> None:
    layer = nn.TransformerDecoderLayer(16, 4, dim_feedforward=32, batch_first=True).eval().double()
    target, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, 16).double()
    mask = ~masks.causal(5, 5)[0, 0]
    expected = layer(target, memory, tgt_mask=mask)
    for name in ("self_attn", "multihead_attn"):
        ours = MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
        ours.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, ours)
    assert (layer(target, memory, tgt_mask=mask) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [Case(), EVERYTHING])
def test_dropout_drops_what_torch_drops(case: Case, implementation: Implementation) -> None:
    theirs, ours = case.modules(torch.float64)
    ours.implementation = implementation
    with torch.no_grad():
        kept, _ = case.run(ours, torch.float64)
        results = []
        for module in (theirs, ours):
            module.dropout = 0.4
            assert torch.equal(case.run(ours, torch.float64)[0], kept), "none in eval mode"
            module.train()
            torch.manual_seed(3)
            results.append(case.run(module, torch.float64))
        (expected, expected_weights), (output, weights) = results
        assert_close(output, expected, 1e-12)
        assert_close(weights, expected_weights, 1e-12)
        assert (output - kept).abs().max() > 0.1
        torch.manual_seed(3)
        alone, _ = replace(case, need_weights=False).run(ours, torch.float64)
        assert torch.equal(alone, output)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_reads_nothing(
    implementation: Implementation, kind: str, need_weights: bool
) -> None:
    case = Case(batch_first=True)
    theirs, ours = case.modules(torch.float64)
    ours.implementation = implementation
    hidden = torch.zeros(5, 7, dtype=torch.bool)
    hidden[2] = True
    mask = hidden if kind == "bool" else torch.zeros(5, 7).double().masked_fill(hidden, -math.inf)
    inputs = [part.requires_grad_() for part in case.inputs(torch.float64)]
    output, weights = ours(*inputs, attn_mask=mask, need_weights=need_weights)
    assert torch.equal(output[:, 2], ours.out_proj.bias.expand(2, -1))
    if need_weights:
        assert (weights[:, 2] == 0).all()
    assert theirs(*inputs, attn_mask=mask)[1][:, 2].isnan().all()
    output.square().sum().backward()
    for leaf in (*inputs, *ours.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60)
@given(case=cases())
def test_weights_are_distributions_and_0_where_masked(
    implementation: Implementation, case: Case
) -> None:
    case = replace(case, need_weights=True, average=False)
    _, ours = case.modules(torch.float64)
    ours.implementation = implementation
    _, weights = case.run(ours, torch.float64)
    assert weights is not None
    assert (weights.sum(dim=-1) - 1).abs().max() <= 1e-12
    attn_mask, padding = case.masks(torch.float64)
    hidden = torch.zeros((*weights.shape[:-1], case.keys), dtype=torch.bool)
    if attn_mask is not None:
        refused = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -math.inf
        hidden = hidden | (refused if refused.dim() == 2 else refused.view_as(hidden))
    if padding is not None:
        refused = padding if padding.dtype == torch.bool else padding == -math.inf
        hidden = hidden | (refused if case.batch is None else refused[:, None, None])
    assert (weights[..., : case.keys][hidden] == 0).all()
    assert (weights[..., : case.keys][~hidden] > 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_causal_does_not_depend_on_whether_weights_are_returned(
    implementation: Implementation,
) -> None:
    case = Case(add_bias_kv=True, is_self=True, keys=5, attn_mask="causal", is_causal=True)
    theirs, ours = case.modules(torch.float64)
    ours.implementation = implementation
    with torch.no_grad():
        expected, _ = case.run(theirs, torch.float64)
        without = replace(case, need_weights=False)
        assert (case.run(ours, torch.float64)[0] - expected).abs().max() <= 1e-12
        assert (without.run(ours, torch.float64)[0] - expected).abs().max() <= 1e-12
        assert (without.run(theirs, torch.float64)[0] - expected).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_torchs(dtype: torch.dtype) -> None:
    case = Case(num_heads=4, head_dim=16, attn_mask="float", padding="bool", queries=33, keys=65)
    theirs, ours = case.modules(dtype)
    exact, _ = case.modules(torch.float64)
    exact.load_state_dict({name: part.double() for name, part in theirs.state_dict().items()})
    inputs, (attn_mask, padding) = case.inputs(dtype), case.masks(dtype)
    assert attn_mask is not None
    with torch.no_grad():
        truth = exact(
            *(part.double() for part in inputs),
            attn_mask=attn_mask.double(),
            key_padding_mask=padding,
        )[0]
        theirs_error, *ours_errors = (
            (run - truth).abs().max()
            for run in (
                case.run(theirs, dtype)[0],
                case.run(ours, dtype)[0],
                replace(case, need_weights=False).run(ours, dtype)[0],
            )
        )
    for error in ours_errors:
        assert error <= 2 * theirs_error
