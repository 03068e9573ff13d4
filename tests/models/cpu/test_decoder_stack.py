"""The layers as one call: the same bits as the modules give, and never those of another model."""

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.config import HeadConfig, KVCacheDType, ModelConfig, QKNorm
from models.cpu.decoder_stack import DecoderStack
from models.cpu.linear import WeightDType
from models.kv_cache import KVCache
from models.layers import RMSNorm
from models.linear import Linear
from models.positions import Alibi, RopeConfig, alibi_slopes
from models.transformer import Transformer
from tests.models import tiny
from tests.models.kernels import needs_library

pytestmark = needs_library

_ROPE, _OTHER_ROPE = RopeConfig(10_000.0, 8), RopeConfig(500.0, 4, interleaved=True)
_HEADS = (
    HeadConfig(4, 2, 8, rope=_ROPE),
    HeadConfig(6, 1, 12, rope=_OTHER_ROPE),
    HeadConfig(2, 2, 32, window=5, rope=_ROPE),
    HeadConfig(4, 4, 16, learned_sinks=True, softcap=20.0),
    HeadConfig(2, 1, 8, alibi=Alibi(alibi_slopes(2))),
    HeadConfig(4, 1, 8, window=3, sink_tokens=2, temperature=(0.5, 1.0, 2.0, 4.0), rope=_ROPE),
)
_CONFIG = tiny.llama(layers=(_HEADS[0], _HEADS[2], _HEADS[3]))


def _hidden(model: Transformer, steps: list[list[int]]) -> list[Tensor]:
    """Of two sequences whose tokens come in so many at a time."""
    lengths = [sum(step[index] for step in steps) for index in range(2)]
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randint(0, 61, (length,), generator=generator) for length in lengths]
    return tiny.paged_hidden(model, tokens, steps)


def _by_modules(model: Transformer, steps: list[list[int]]) -> list[Tensor]:
    with mock.patch.object(DecoderStack, "of", return_value=None):
        return _hidden(model, steps)


def _packed(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = tiny.model(config, dtype=dtype)
    model.pack_weights(batch_invariant=True)  # also where torch's products are faster
    return model


_STEPS = [[5, 9], [1, 3], [1, 1]]


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(st.sampled_from(_HEADS), min_size=1, max_size=4),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    weight_dtype=st.sampled_from(["auto", "int8"]),
    kv_cache_dtype=st.sampled_from(["auto", "int8"]),
    cuts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
)
def test_it_gives_the_bits_of_the_modules(
    layers: list[HeadConfig],
    biases: tuple[bool, bool, bool],
    dtype: torch.dtype,
    weight_dtype: WeightDType,
    kv_cache_dtype: KVCacheDType,
    cuts: list[tuple[int, int]],
) -> None:
    names = ("qkv_bias", "output_bias", "mlp_bias")
    config = tiny.llama(
        layers=tuple(layers),
        kv_cache_dtype=kv_cache_dtype,
        **dict(zip(names, biases, strict=True)),
    )
    model = tiny.model(config, dtype=dtype)
    model.pack_weights(weight_dtype, batch_invariant=True)
    steps = [list(cut) for cut in cuts]
    expected = _by_modules(model, steps)
    with mock.patch.object(DecoderStack, "run", autospec=True, side_effect=DecoderStack.run) as run:
        found = _hidden(model, steps)
    assert run.call_count == len(steps)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        tiny.gpt2(),
        _CONFIG.replace(layers=(replace(_HEADS[0], qk_norm=QKNorm("rms_norm", "head", 1e-6)),)),
        _CONFIG.replace(layers=(replace(_HEADS[0], clip_qkv=1.0),)),
        _CONFIG.replace(layers=(HeadConfig(4, 2, 8, window=(None, None, 4, 4)),)),
        _CONFIG.replace(activation="gelu_tanh"),
        _CONFIG.replace(residual_scale=0.5),
        _CONFIG.replace(residual="sandwich_norm"),
        _CONFIG.replace(norm_unit_offset=True),
        _CONFIG.replace(projection_rank=4),
    ],
    ids=lambda config: "",
)
def test_other_layers_are_computed_by_their_modules(config: ModelConfig) -> None:
    model = tiny.model(config)
    model.pack_weights()
    with mock.patch.object(DecoderStack, "run", side_effect=AssertionError):
        _hidden(model, _STEPS)


def test_plain_weights_are_multiplied_by_their_modules() -> None:
    with mock.patch.object(DecoderStack, "run", side_effect=AssertionError):
        _hidden(tiny.model(_CONFIG), _STEPS)


def _norm(model: Transformer, name: str) -> RMSNorm:
    norm = model.get_submodule(name)
    assert isinstance(norm, RMSNorm)
    return norm


def _layers(model: Transformer) -> nn.ModuleList:
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _another_norm(model: Transformer) -> None:
    norm = _norm(model, "layers.1.mlp_norm")
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)


def _another_weight(model: Transformer) -> None:
    linear = model.attentions[0].output
    assert isinstance(linear, Linear)
    linear.unpack()
    linear.weight = nn.Parameter(linear.weight * 2, requires_grad=False)
    linear.pack(although_slower=True)


def _another_layer(model: Transformer) -> None:
    _layers(model)[0] = copy.deepcopy(_layers(model)[0])
    _in_place(model)


def _in_place(model: Transformer) -> None:
    _norm(model, "layers.0.attention_norm").weight.mul_(3.0)


def _rounded(model: Transformer) -> None:
    model.pack_weights("int8")


def _sinks_in_place(model: Transformer) -> None:
    sinks = model.attentions[2].sinks
    assert sinks is not None
    sinks.add_(3.0)


def _another_eps(model: Transformer) -> None:
    _norm(model, "layers.0.mlp_norm").eps = 0.5


def _a_hook(model: Transformer) -> None:
    model.attentions[0].output.register_forward_hook(lambda _, given, output: 2 * output)


@pytest.mark.parametrize(
    "change",
    [
        _a_hook,
        _another_norm,
        _another_weight,
        _another_layer,
        _in_place,
        _sinks_in_place,
        _another_eps,
        _rounded,
    ],
)
def test_a_change_of_the_model_is_seen(change: Callable[[Transformer], None]) -> None:
    """With the same cache, by a step after it."""

    def hidden(by_modules: bool) -> list[Tensor]:
        model = _packed(_CONFIG)
        steps: list[DecoderStack | None] = []
        original = DecoderStack.of

        def changing(layers: nn.ModuleList, cache: KVCache) -> DecoderStack | None:
            if len(steps) == 1:
                change(model)
            steps.append(None if by_modules else original(layers, cache))
            return steps[-1]

        with mock.patch.object(DecoderStack, "of", changing):
            found = _hidden(model, _STEPS)
        assert len(steps) == len(_STEPS)
        assert (steps[0] is None) == by_modules
        return found

    for one, other in zip(hidden(by_modules=False), hidden(by_modules=True), strict=True):
        assert torch.equal(one, other)


def test_what_is_described_stays_while_nothing_changes() -> None:
    seen: list[DecoderStack | None] = []
    original = DecoderStack.of

    def of(layers: nn.ModuleList, cache: KVCache) -> DecoderStack | None:
        seen.append(original(layers, cache))
        return seen[-1]

    with mock.patch.object(DecoderStack, "of", of):
        _hidden(_packed(_CONFIG), _STEPS)
    assert seen[0] is not None
    assert all(stack is seen[0] for stack in seen)


def test_who_watches_a_module_sees_it() -> None:
    model = _packed(_CONFIG)
    inputs: list[Tensor] = []

    def watch(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given and given[0].shape[-1] == 32:  # what the heads of the first layer read
            inputs.append(given[0])

    attention = model.attentions[0]
    for register in (
        attention.output.register_forward_pre_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        inputs.clear()
        handle = register(watch)
        _hidden(model, _STEPS)
        handle.remove()
        assert len(inputs) >= len(_STEPS)
        count = len(inputs)
        _hidden(model, _STEPS)
        assert len(inputs) == count


def test_one_model_computes_with_several_caches() -> None:
    """Each has the layers described for itself, and takes them with it."""
    model = _packed(_CONFIG)
    caches: list[KVCache] = []
    original = DecoderStack.of

    def of(layers: nn.ModuleList, cache: KVCache) -> DecoderStack | None:
        caches.append(cache)
        return original(layers, cache)

    with mock.patch.object(DecoderStack, "of", of):
        first, second = _hidden(model, _STEPS), _hidden(model, _STEPS)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    assert caches[0].stack is not None
    assert caches[0].stack is not caches[-1].stack
    gone = [weakref.ref(cache) for cache in caches]
    caches.clear()
    assert all(cache() is None for cache in gone), "nothing waits for the garbage collector"


def test_a_copy_of_a_model_computes_by_itself() -> None:
    model = _packed(_CONFIG)
    expected = _hidden(model, _STEPS)
    copied = copy.deepcopy(model)
    _norm(model, "layers.0.attention_norm").weight.zero_()
    for one, other in zip(_hidden(copied, _STEPS), expected, strict=True):
        assert torch.equal(one, other)
