"""What GetModel says about heads, and what the command line makes of it."""

from typing import Any

import pytest

from models.config import HeadConfig, QKNorm
from models.positions import Alibi as AlibiConfig
from models.positions import Llama3Scaling, RopeConfig, alibi_slopes
from protos.headroom.v1.models_pb2 import GetModelResponse
from service.codec.descriptions import layer_heads
from service.console import describe

ROPE = RopeConfig(500_000.0, 32, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
PLAIN = HeadConfig(12, 4, 64, rope=RopeConfig(10_000.0, 64))
RICH = HeadConfig(
    4,
    2,
    64,
    scale=0.5,
    window=(128, None, 128, 64),
    sink_tokens=4,
    learned_sinks=True,
    softcap=50.0,
    temperature=(1.0, 2.0, 1.0, 1.0),
    rope=ROPE,
    qk_norm=QKNorm("rms_norm", "head", 1e-6),
)


def test_a_plain_layer_says_nothing_of_what_it_lacks() -> None:
    layer = layer_heads(PLAIN)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (12, 4, 64)
    assert not layer.HasField("window")
    assert not layer.HasField("softcap")
    assert not layer.head_windows
    assert (layer.scale, layer.rope_theta, layer.rotary_dim) == (0.125, 10_000.0, 64)
    assert layer.label == "h12kv4d64"


def test_windows_sinks_and_the_rest_are_told() -> None:
    layer = layer_heads(RICH)
    assert not layer.HasField("window")
    assert list(layer.head_windows) == [128, 0, 128, 64]
    assert (layer.sink_tokens, layer.learned_sinks, layer.softcap) == (4, True, 50.0)
    assert (layer.scale, list(layer.temperature)) == (0.5, [1.0, 2.0, 1.0, 1.0])
    assert (layer.qk_norm, layer.rope_scaling, layer.rotary_dim) == ("head", "llama3", 32)


def test_one_window_for_all_is_one_number() -> None:
    for window in (512, (512,) * 4):
        layer = layer_heads(HeadConfig(4, 2, 64, window=window))
        assert layer.window == 512
        assert not layer.head_windows
        assert not layer.HasField("rope_theta")
    unlimited = layer_heads(HeadConfig(4, 2, 64, window=(None,) * 4))
    assert not unlimited.HasField("window")
    assert layer_heads(HeadConfig(4, 4, 8, alibi=AlibiConfig(alibi_slopes(4)))).alibi


def test_the_command_line_shows_it() -> None:
    layers = [layer_heads(heads) for heads in (PLAIN, RICH, PLAIN)]
    lines = describe(GetModelResponse(name="m", family="f", is_causal=False, layers=layers))
    assert "(f encoder" in lines["model"]
    assert lines["heads"] == "h12kv4d64 x 2 layers, h4kv2d64w128/all/64 x 1 layers"
    assert lines["scores"] == (
        "rope 10000 on 64 dims, scale 0.125 x 2 layers; "
        "rope 500000 llama3 on 32 dims, windows 128/all/128/64, 4 sink tokens, learned sinks, "
        "softcap 50, qk-norm per head, scale 0.5 x 1 layers"
    )


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"weight_dtype": "auto", "kv_cache_dtype": "auto"}, "bfloat16 on cpu"),
        ({"weight_dtype": "int8"}, "bfloat16 with weights of 8 bits on cpu"),
        (
            {"weight_dtype": "int8", "kv_cache_dtype": "int8"},
            "bfloat16 with weights and keys and values of 8 bits on cpu",
        ),
    ],
    ids=str,
)
def test_numbers_of_8_bits_are_said(types: dict[str, Any], expected: str) -> None:
    message = GetModelResponse(dtype="bfloat16", device="cpu", is_causal=True, **types)
    assert expected in describe(message)["model"]
