"""Wrong attention requests, each with the field that the answer has to name."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from protos.headroom.v1 import attention_pb2 as pb
from protos.headroom.v1 import tensor_pb2

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 4, 2, 3, 5, 8
HIDDEN_SIZE, NUM_LAYERS, MAX_MODEL_LEN = 64, 2, 128  # of tests.checkpoints.llama()


def tensor(dtype: str, values: Any) -> tensor_pb2.Tensor:
    array = np.asarray(values)
    return tensor_pb2.Tensor(
        dtype=f"DATA_TYPE_{dtype}", shape=array.shape, data=np.ascontiguousarray(array).tobytes()
    )


def zeros(*shape: int) -> tensor_pb2.Tensor:
    return tensor("FLOAT32", np.zeros(shape, "<f4"))


def integers(*values: Any) -> tensor_pb2.Tensor:
    return tensor("INT64", np.array(values, "<i8"))


def qkv_request() -> pb.AttendRequest:
    """A right one."""
    return pb.AttendRequest(
        qkv=pb.QKV(
            query=zeros(BATCH, HEADS, QUERIES, DIM),
            key=zeros(BATCH, KV_HEADS, KEYS, DIM),
            value=zeros(BATCH, KV_HEADS, KEYS, DIM),
            layout="LAYOUT_BATCH_HEADS_TOKENS_DIM",
        ),
        variant=pb.Variant(mask="MASK_KIND_CAUSAL"),
    )


def hidden_request() -> pb.AttendRequest:
    """A right one."""
    return pb.AttendRequest(hidden=pb.HiddenInput(hidden=zeros(7, HIDDEN_SIZE), layer=1))


def _holding(number: float, at: tuple[int, ...], dtype: str = "<f4") -> np.ndarray[Any, Any]:
    array = np.zeros((BATCH, KV_HEADS, KEYS, DIM), dtype)
    array[at] = number
    return array


def _qkv(**tensors: tensor_pb2.Tensor) -> pb.AttendRequest:
    request = qkv_request()
    for name, given in tensors.items():
        getattr(request.qkv, name).CopyFrom(given)
    return request


def _variant(**fields: Any) -> pb.AttendRequest:
    request = qkv_request()
    request.variant.MergeFrom(pb.Variant(**fields))
    return request


def _rope(**fields: Any) -> pb.AttendRequest:
    return _variant(rope=pb.Rope(**fields))


def _hidden(given: tensor_pb2.Tensor, **fields: Any) -> pb.AttendRequest:
    return pb.AttendRequest(hidden=pb.HiddenInput(hidden=given), **fields)


def _edited(edit: Callable[[pb.AttendRequest], object]) -> pb.AttendRequest:
    request = qkv_request()
    edit(request)
    return request


def _flawed(dtype: int, shape: list[int], data: bytes) -> pb.AttendRequest:
    return _qkv(query=tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data))  # type: ignore[arg-type]


NAN, INF = math.nan, math.inf
_VISIBLE = np.ones((QUERIES, KEYS), "?")
_EVEN = np.ones((4, 4), "?")

# name: (request, field named in the answer, part of what the answer says is allowed)
BAD_ATTENTION: dict[str, tuple[pb.AttendRequest, str, str]] = {
    "no input": (pb.AttendRequest(), "input", "qkv or hidden"),
    "no query": (_edited(lambda r: r.qkv.ClearField("query")), "qkv.query", "four axes"),
    "no variant": (_edited(lambda r: r.ClearField("variant")), "variant", "mask"),
    "no layout": (_edited(lambda r: r.qkv.ClearField("layout")), "qkv.layout", "shapes do not say"),
    "unknown layout": (
        _edited(lambda r: setattr(r.qkv, "layout", 99)),
        "qkv.layout",
        "TOKENS_BATCH_HEADS_DIM",
    ),
    "unknown implementation": (
        _edited(lambda r: setattr(r, "implementation", 7)),
        "implementation",
        "FUSED or SPLIT",
    ),
    "head outputs, fused": (
        _edited(lambda r: setattr(r, "want_head_outputs", True)),
        "want_head_outputs",
        "with SPLIT only",
    ),
    "no dtype": (_flawed(0, [2, 4, 3, 8], b""), "qkv.query.dtype", "FLOAT32, FLOAT64"),
    "unknown dtype": (_flawed(77, [2, 4, 3, 8], b""), "qkv.query.dtype", "FLOAT32, FLOAT64"),
    "integers": (
        _qkv(query=tensor("INT64", np.zeros((2, 4, 3, 8), "<i8"))),
        "qkv.query.dtype",
        "FLOAT32, FLOAT64, BFLOAT16, FLOAT16",
    ),
    "two dtypes": (
        _qkv(value=tensor("FLOAT64", np.zeros((2, 2, 5, 8), "<f8"))),
        "qkv.value.dtype",
        "FLOAT32, the query's",
    ),
    "three axes": (_qkv(key=zeros(2, 5, 8)), "qkv.key.shape", "4 axes"),
    "many axes": (_flawed(1, [1] * 5000, b"0000"), "qkv.query.shape", "4 axes"),
    "no axes": (_flawed(1, [], b"0000"), "qkv.query.shape", "4 axes"),
    "an empty axis": (_qkv(query=zeros(2, 4, 0, 8)), "qkv.query.shape", "1 or more along each"),
    "data too short": (_flawed(1, [2, 4, 3, 8], bytes(764)), "qkv.query.data", "768 bytes"),
    "data too long": (_flawed(1, [2, 4, 3, 8], bytes(772)), "qkv.query.data", "768 bytes"),
    "no data": (_flawed(1, [2, 4, 3, 8], b""), "qkv.query.data", "768 bytes"),
    "a shape of terabytes": (
        _flawed(2, [2**40, 2**40, 2**60, 8], bytes(64)),
        "qkv.query.data",
        "bytes: shape [1099511627776,",
    ),
    "a shape that wraps round": (
        _flawed(1, [2**63, 2, 1, 1], b""),
        "qkv.query.data",
        "73786976294838206464 bytes",
    ),
    "nan": (
        _qkv(key=tensor("FLOAT32", _holding(NAN, (1, 0, 4, 7)))),
        "qkv.key.data",
        "finite numbers",
    ),
    "inf in float16": (
        _edited(
            lambda r: [
                getattr(r.qkv, name).CopyFrom(
                    tensor("FLOAT16", _holding(-INF, (0, 1, 2, 3), "<f2"))
                )
                for name in ("query", "key", "value")
            ]
        ),
        "qkv.value.data",
        "finite numbers",
    ),
    "nan in bfloat16": (
        _edited(
            lambda r: [
                getattr(r.qkv, name).CopyFrom(
                    tensor("BFLOAT16", _holding(0x7FC0, (0, 1, 2, 3), "<u2"))
                )
                for name in ("query", "key", "value")
            ]
        ),
        "qkv.query.data",
        "finite numbers",
    ),
    "batches differ": (_qkv(key=zeros(3, 2, 5, 8)), "qkv.key.shape", "2, the query's"),
    "dims differ": (_qkv(key=zeros(2, 2, 5, 4)), "qkv.key.shape", "8, the query's"),
    "heads do not divide": (_qkv(key=zeros(2, 3, 5, 8)), "qkv.key.shape", "divides the query's 4"),
    "more kv heads": (_qkv(key=zeros(2, 8, 5, 8)), "qkv.key.shape", "divides the query's 4"),
    "value batches differ": (_qkv(value=zeros(1, 2, 5, 8)), "qkv.value.shape", "2, the key's"),
    "value heads differ": (_qkv(value=zeros(2, 4, 5, 8)), "qkv.value.shape", "2, the key's"),
    "value tokens differ": (_qkv(value=zeros(2, 2, 6, 8)), "qkv.value.shape", "5, the key's"),
    "no mask": (
        _edited(lambda r: r.variant.ClearField("mask")),
        "variant.mask",
        "CAUSAL, BIDIRECTIONAL or PREFIX",
    ),
    "unknown mask": (
        _edited(lambda r: setattr(r.variant, "mask", 9)),
        "variant.mask",
        "CAUSAL, BIDIRECTIONAL or PREFIX",
    ),
    "prefix without lengths": (
        _variant(mask="MASK_KIND_PREFIX"),
        "variant.prefix_lengths",
        "set with mask PREFIX",
    ),
    "lengths without prefix": (
        _variant(prefix_lengths=[1, 1]),
        "variant.prefix_lengths",
        "set with mask PREFIX",
    ),
    "one prefix for two rows": (
        _variant(mask="MASK_KIND_PREFIX", prefix_lengths=[1]),
        "variant.prefix_lengths",
        "one for each of 2 rows",
    ),
    "prefix too long": (
        _variant(mask="MASK_KIND_PREFIX", prefix_lengths=[5, 6]),
        "variant.prefix_lengths[1]",
        "0 to 5 keys",
    ),
    "key lengths": (_variant(key_lengths=[6, 1]), "variant.key_lengths[0]", "0 to 5 keys"),
    "key length count": (_variant(key_lengths=[1] * 3), "variant.key_lengths", "each of 2 rows"),
    "segments of another length": (
        _variant(segment_ids=integers(0, 0, 1)),
        "variant.segment_ids.shape",
        "[5] or [2, 5]",
    ),
    "segments of three rows": (
        _variant(segment_ids=integers(*[[0] * 5] * 3)),
        "variant.segment_ids.shape",
        "[5] or [2, 5]",
    ),
    "fractional segments": (
        _variant(segment_ids=tensor("FLOAT32", np.zeros(5, "<f4"))),
        "variant.segment_ids.dtype",
        "INT64",
    ),
    "negative positions": (
        _variant(key_positions=integers(0, 1, 2, -3, 4)),
        "variant.key_positions.data",
        "0 to 2147483647",
    ),
    "huge positions": (
        _variant(query_positions=integers(0, 1, 2**31)),
        "variant.query_positions.data",
        "0 to 2147483647",
    ),
    "positions of another length": (
        _variant(query_positions=integers(0, 1, 2, 3, 4)),
        "variant.query_positions.shape",
        "[3] or [2, 3]",
    ),
    "causal with too many queries": (
        _qkv(query=zeros(2, 4, 6, 8)),
        "variant.query_positions",
        "set",
    ),
    "visible of another shape": (
        _variant(visible=tensor("BOOL", _VISIBLE.T)),
        "variant.visible.shape",
        "[queries=3, keys=5]",
    ),
    "visible of three axes": (
        _variant(visible=tensor("BOOL", _VISIBLE[None])),
        "variant.visible.shape",
        "2 or 4 axes",
    ),
    "visible as floats": (
        _variant(visible=tensor("FLOAT32", _VISIBLE.astype("<f4"))),
        "variant.visible.dtype",
        "BOOL",
    ),
    "visible of twos": (
        _variant(visible=tensor("BOOL", _VISIBLE.astype("u1") * 2)),
        "variant.visible.data",
        "0 or 1",
    ),
    "visible turned round": (
        _variant(visible=tensor("BOOL", ~np.tri(QUERIES, KEYS, KEYS - QUERIES, dtype="?"))),
        "variant.visible.data",
        "turned round",
    ),
    "nothing visible": (
        _variant(visible=tensor("BOOL", ~_VISIBLE)),
        "variant.visible.data",
        "true where a key may be seen",
    ),
    "nan in bias": (
        _variant(bias=tensor("FLOAT32", np.full((QUERIES, KEYS), NAN, "<f4"))),
        "variant.bias.data",
        "finite numbers and -inf",
    ),
    "inf in bias": (
        _variant(bias=tensor("FLOAT64", np.full((1, 1, QUERIES, KEYS), INF, "<f8"))),
        "variant.bias.data",
        "finite numbers and -inf",
    ),
    "bias of other heads": (
        _variant(bias=zeros(1, 2, QUERIES, KEYS)),
        "variant.bias.shape",
        "heads=4 or 1",
    ),
    "window 0": (_variant(window=0), "variant.window", "1 (a query sees its own key) or more"),
    "two kinds of windows": (
        _variant(window=2, head_windows=[1, 2, 3, 0]),
        "variant.head_windows",
        "one of the two",
    ),
    "windows of other heads": (
        _variant(head_windows=[1, 2]),
        "variant.head_windows",
        "one for each of 4 query heads",
    ),
    "temperatures": (_variant(temperature=[1.0]), "variant.temperature", "each of 4 query heads"),
    "temperature nan": (
        _variant(temperature=[1, 1, NAN, 1]),
        "variant.temperature[2]",
        "a finite number",
    ),
    "sinks": (_variant(sinks=[1.0] * 5), "variant.sinks", "one for each of 4 query heads"),
    "sinks inf": (_variant(sinks=[INF] * 4), "variant.sinks[0]", "a finite number"),
    "scale": (_variant(scale=NAN), "variant.scale", "a finite number"),
    "softcap": (_variant(softcap=0.0), "variant.softcap", "a finite number above 0"),
    "softcap nan": (_variant(softcap=NAN), "variant.softcap", "a finite number above 0"),
    "alibi without slopes": (
        _variant(alibi=pb.Alibi()),
        "variant.alibi.slopes",
        "one for each head",
    ),
    "slopes": (
        _variant(alibi=pb.Alibi(slopes=[0.5])),
        "variant.alibi.slopes",
        "one for each of 4 query heads",
    ),
    "theta": (_rope(theta=0.0), "variant.rope.theta", "a finite number above 1"),
    "odd rotary_dim": (_rope(rotary_dim=5), "variant.rope.rotary_dim", "even, 2 or more"),
    "wide rotary_dim": (_rope(rotary_dim=10), "variant.rope.rotary_dim", "at most the 8"),
    "no rotary_dim": (_rope(rotary_dim=0), "variant.rope.rotary_dim", "even, 2 or more"),
    "linear factor": (
        _rope(linear=pb.LinearScaling()),
        "variant.rope.linear.factor",
        "a finite number above 0",
    ),
    "dynamic length": (
        _rope(dynamic_ntk=pb.DynamicNtkScaling(factor=2)),
        "variant.rope.dynamic_ntk.original_length",
        "1 or more",
    ),
    "dynamic factor": (
        _rope(dynamic_ntk=pb.DynamicNtkScaling(factor=0.5, original_length=4)),
        "variant.rope.dynamic_ntk.factor",
        "1 or more",
    ),
    "yarn betas": (
        _rope(yarn=pb.YarnScaling(factor=2, original_length=4, beta_fast=0.5)),
        "variant.rope.yarn.beta_fast",
        "beta_slow=1 or more",
    ),
    "yarn attention factor": (
        _rope(yarn=pb.YarnScaling(factor=2, original_length=4, attention_factor=NAN)),
        "variant.rope.yarn.attention_factor",
        "a finite number above 0",
    ),
    "llama3 factors": (
        _rope(llama3=pb.Llama3Scaling(factor=2, low_freq_factor=4, high_freq_factor=1)),
        "variant.rope.llama3.high_freq_factor",
        "above low_freq_factor=4",
    ),
    "long rope divisors": (
        _rope(longrope=pb.LongRopeScaling(short_factor=[1, 1], original_length=4)),
        "variant.rope.longrope.short_factor",
        "one for each of 4 rotated pairs",
    ),
    "long rope zero": (
        _rope(longrope=pb.LongRopeScaling(short_factor=[1, 0, 1, 1], original_length=4)),
        "variant.rope.longrope.short_factor[1]",
        "a finite number above 0",
    ),
    "layer": (
        pb.AttendRequest(hidden=pb.HiddenInput(hidden=zeros(7, HIDDEN_SIZE), layer=NUM_LAYERS)),
        "hidden.layer",
        "0 to 1",
    ),
    "no hidden": (pb.AttendRequest(hidden=pb.HiddenInput()), "hidden.hidden", "[tokens, hidden]"),
    "hidden of one axis": (_hidden(zeros(64)), "hidden.hidden.shape", "2 or 3 axes"),
    "hidden width": (_hidden(zeros(7, 65)), "hidden.hidden.shape", "64 along the last axis"),
    "too many tokens": (
        _hidden(zeros(MAX_MODEL_LEN + 1, HIDDEN_SIZE)),
        "hidden.hidden.shape",
        "at most 128 tokens",
    ),
    "hidden beyond the model's type": (
        _hidden(tensor("FLOAT64", np.full((1, HIDDEN_SIZE), 1e39, "<f8"))),
        "hidden.hidden.data",
        "finite numbers of at most 3.40282e+38",
    ),
    "hidden integers": (
        _hidden(tensor("INT64", np.zeros((1, HIDDEN_SIZE), "<i8"))),
        "hidden.hidden.dtype",
        "FLOAT32",
    ),
    "hidden with a variant": (
        _hidden(zeros(1, HIDDEN_SIZE), variant=pb.Variant(mask="MASK_KIND_CAUSAL")),
        "variant",
        "the layer's heads decide",
    ),
}
