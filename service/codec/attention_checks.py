"""What can be wrong with an AttendRequest. Every wrong field is found, none is corrected."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from models.config import ModelConfig
from protos.headroom.v1 import attention_pb2 as pb
from protos.headroom.v1 import tensor_pb2
from service.codec.rope_checks import rope_violations
from service.codec.tensor_checks import (
    FLOATING,
    NumberBounds,
    dtype_name,
    show_shape,
    tensor_violations,
)
from service.engine.errors import Violation
from service.tensors import WireArray

# Where batch, heads, tokens and dim stand in each layout.
AXES: dict[int, tuple[int, int, int, int]] = {
    pb.LAYOUT_BATCH_HEADS_TOKENS_DIM: (0, 1, 2, 3),
    pb.LAYOUT_BATCH_TOKENS_HEADS_DIM: (0, 2, 1, 3),
    pb.LAYOUT_TOKENS_BATCH_HEADS_DIM: (1, 2, 0, 3),
}
MAX_POSITION = 2**31 - 1
_LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}
_MASKS = "CAUSAL, BIDIRECTIONAL or PREFIX"


@dataclass(frozen=True, slots=True)
class Shapes:
    """What queries, keys and values say about each other; None where one of them is wrong."""

    batch: int | None = None
    num_heads: int | None = None
    queries: int | None = None
    keys: int | None = None
    head_dim: int | None = None


def attend_violations(
    request: pb.AttendRequest, config: ModelConfig, max_model_len: int
) -> Iterator[Violation]:
    """Check a request against the served model.

    Args:
        config: the model's, with the type that it computes in.
    """
    match request.WhichOneof("input"):
        case "qkv":
            yield from _qkv_violations(request.qkv)
            if request.HasField("variant"):
                yield from _variant_violations(request.variant, _shapes(request.qkv))
            else:
                yield Violation("variant", "unset", "what the mask is, at least")
        case "hidden":
            yield from _hidden_violations(request.hidden, config, max_model_len)
            if request.HasField("variant"):
                yield Violation(
                    "variant", "set", "unset with a hidden input: the layer's heads decide"
                )
        case _:
            yield Violation("input", "unset", "qkv or hidden")
    if request.implementation not in pb.Implementation.values():
        yield Violation("implementation", str(request.implementation), "FUSED or SPLIT")
    elif request.want_head_outputs and request.implementation != pb.IMPLEMENTATION_SPLIT:
        yield Violation(
            "want_head_outputs", "true with FUSED", "with SPLIT only, where single heads exist"
        )


def _qkv_violations(qkv: pb.QKV) -> Iterator[Violation]:
    for name in ("query", "key", "value"):
        if qkv.HasField(name):
            tensor = getattr(qkv, name)
            yield from tensor_violations(f"qkv.{name}", tensor, dtypes=FLOATING, ranks=(4,))
        else:
            yield Violation(f"qkv.{name}", "unset", "a tensor of four axes")
    for name, tensor in (("key", qkv.key), ("value", qkv.value)):
        if {tensor.dtype, qkv.query.dtype} <= {*FLOATING} and tensor.dtype != qkv.query.dtype:
            like = dtype_name(qkv.query.dtype)
            yield Violation(f"qkv.{name}.dtype", dtype_name(tensor.dtype), f"{like}, the query's")
    if qkv.layout not in AXES:
        allowed = ", ".join(name.removeprefix("LAYOUT_") for name in pb.Layout.keys()[1:])
        yield Violation("qkv.layout", "unspecified", f"{allowed}: shapes do not say which it is")
        return
    sizes = [_sizes(tensor, qkv.layout) for tensor in (qkv.query, qkv.key, qkv.value)]
    query, key, value = sizes
    if query is not None and key is not None:
        yield from _differing("qkv.key", qkv.key, "batch", key[0], query[0], "query")
        yield from _differing("qkv.key", qkv.key, "dim", key[3], query[3], "query")
        if key[1] and query[1] % key[1]:
            yield Violation(
                "qkv.key.shape",
                f"{show_shape(qkv.key)} with {key[1]} heads",
                f"a number of heads that divides the query's {query[1]}",
            )
    if key is not None and value is not None:
        for axis, name in enumerate(("batch", "heads", "tokens")):
            yield from _differing("qkv.value", qkv.value, name, value[axis], key[axis], "key")


def _differing(
    field: str, tensor: tensor_pb2.Tensor, axis: str, size: int, expected: int, like: str
) -> Iterator[Violation]:
    if size != expected:
        yield Violation(
            f"{field}.shape",
            f"{show_shape(tensor)} with {axis} {size}",
            f"{expected}, the {like}'s",
        )


def _sizes(tensor: tensor_pb2.Tensor, layout: int) -> list[int] | None:
    """Batch, heads, tokens and dim that a tensor claims to have."""
    if len(tensor.shape) != 4 or layout not in AXES:
        return None
    return [tensor.shape[axis] for axis in AXES[layout]]


def _shapes(qkv: pb.QKV) -> Shapes:
    query, key = _sizes(qkv.query, qkv.layout), _sizes(qkv.key, qkv.layout)
    keys = None if key is None else key[2]
    if query is None:
        return Shapes(keys=keys)
    return Shapes(query[0], query[1], query[2], keys, query[3])


def _variant_violations(variant: pb.Variant, shapes: Shapes) -> Iterator[Violation]:
    if variant.mask not in pb.MaskKind.values() or not variant.mask:
        yield Violation("variant.mask", "unspecified", _MASKS)
    yield from _row_lengths("prefix_lengths", variant.prefix_lengths, shapes)
    if bool(variant.prefix_lengths) != (variant.mask == pb.MASK_KIND_PREFIX):
        given = "set" if variant.prefix_lengths else "empty"
        yield Violation("variant.prefix_lengths", given, "set with mask PREFIX, and only with it")
    yield from _row_lengths("key_lengths", variant.key_lengths, shapes)
    yield from _token_tensor(variant, "segment_ids", shapes.batch, shapes.keys, NumberBounds())
    positions = NumberBounds(integers=(0, MAX_POSITION))
    yield from _token_tensor(variant, "query_positions", shapes.batch, shapes.queries, positions)
    yield from _token_tensor(variant, "key_positions", shapes.batch, shapes.keys, positions)
    yield from _alignment(variant, shapes)
    yield from _mask_violations(variant, shapes)
    yield from _scoring_violations(variant, shapes)
    if variant.HasField("rope"):
        yield from rope_violations("variant.rope", variant.rope, shapes.head_dim)


def _row_lengths(name: str, lengths: Sequence[int], shapes: Shapes) -> Iterator[Violation]:
    field = f"variant.{name}"
    if lengths and shapes.batch is not None and len(lengths) != shapes.batch:
        yield Violation(field, f"{len(lengths)} numbers", f"one for each of {shapes.batch} rows")
    for index, length in enumerate(lengths):
        if shapes.keys is not None and length > shapes.keys:
            yield Violation(f"{field}[{index}]", str(length), f"0 to {shapes.keys} keys")
            return


def _token_tensor(
    variant: pb.Variant, name: str, batch: int | None, tokens: int | None, bounds: NumberBounds
) -> Iterator[Violation]:
    """A number for each token, of all rows or of each."""
    if not variant.HasField(name):
        return
    tensor: tensor_pb2.Tensor = getattr(variant, name)
    field = f"variant.{name}"
    integers = (tensor_pb2.DATA_TYPE_INT64,)
    yield from tensor_violations(field, tensor, dtypes=integers, ranks=(1, 2), bounds=bounds)
    if batch is None or tokens is None or len(tensor.shape) not in (1, 2):
        return
    if tuple(tensor.shape) not in {(tokens,), (batch, tokens), (1, tokens)}:
        yield Violation(f"{field}.shape", show_shape(tensor), f"[{tokens}] or [{batch}, {tokens}]")


def _alignment(variant: pb.Variant, shapes: Shapes) -> Iterator[Violation]:
    """Queries beyond the keys have no position of their own."""
    if shapes.queries is None or shapes.keys is None or shapes.queries <= shapes.keys:
        return
    many = f"{shapes.queries} queries for {shapes.keys} keys"
    if variant.HasField("segment_ids"):
        yield Violation("variant.segment_ids", f"set for {many}", "at most as many queries as keys")
    needs = variant.mask != pb.MASK_KIND_BIDIRECTIONAL or variant.HasField("rope")
    needs = needs or variant.HasField("window") or bool(variant.head_windows)
    if needs and not variant.HasField("query_positions"):
        yield Violation("variant.query_positions", f"unset for {many}", "set")


def _mask_violations(variant: pb.Variant, shapes: Shapes) -> Iterator[Violation]:
    booleans = (tensor_pb2.DATA_TYPE_BOOL,)
    for name, dtypes in (("visible", booleans), ("bias", FLOATING)):
        if not variant.HasField(name):
            continue
        tensor: tensor_pb2.Tensor = getattr(variant, name)
        field = f"variant.{name}"
        bounds = NumberBounds(minus_infinity=True)
        found = [*tensor_violations(field, tensor, dtypes=dtypes, ranks=(2, 4), bounds=bounds)]
        sizes = (shapes.batch, shapes.num_heads, shapes.queries, shapes.keys)
        named = zip(("batch", "heads", "queries", "keys"), sizes, strict=True)
        fits = all(
            given == size or (given == 1 and len(tensor.shape) == 4) or size is None
            for given, size in zip(tensor.shape, sizes[-len(tensor.shape) :], strict=False)
        )
        if len(tensor.shape) in (2, 4) and not fits:
            allowed = ", ".join(f"{axis}={size} or 1" for axis, size in named)
            last = f"[queries={shapes.queries}, keys={shapes.keys}]"
            found.append(Violation(f"{field}.shape", show_shape(tensor), f"{last} or [{allowed}]"))
        yield from found
        if name == "visible" and not found:
            yield from _polarity_violations(tensor)


def _polarity_violations(tensor: tensor_pb2.Tensor) -> Iterator[Violation]:
    """Masks that mean the opposite in torch.nn.MultiheadAttention are sent by mistake."""
    visible = WireArray.of(tensor).values
    if not visible.any():
        yield Violation("variant.visible.data", "false everywhere", "true where a key may be seen")
    elif min(visible.shape[-2:]) > 1:
        queries, keys = visible.shape[-2:]
        if (visible == ~np.tri(queries, keys, keys - queries, dtype=bool)).all():
            yield Violation(
                "variant.visible.data",
                "true for exactly the keys after each query",
                "true where a key may be seen; this is the causal mask turned round",
            )


def _scoring_violations(variant: pb.Variant, shapes: Shapes) -> Iterator[Violation]:
    if variant.HasField("window"):
        if variant.window < 1:
            yield Violation("variant.window", "0", "1 (a query sees its own key) or more, or unset")
        if variant.head_windows:
            yield Violation("variant.head_windows", "set beside window", "one of the two")
    if variant.HasField("softcap") and not 0 < variant.softcap < math.inf:
        yield Violation("variant.softcap", f"{variant.softcap:g}", "a finite number above 0")
    if variant.HasField("scale") and not 0 < variant.scale < math.inf:
        yield Violation("variant.scale", f"{variant.scale:g}", "a finite number above 0")
    slopes = variant.alibi.slopes
    if variant.HasField("alibi") and not slopes:
        yield Violation("variant.alibi.slopes", "empty", "one for each head")
    for field, values in (
        ("head_windows", variant.head_windows),
        ("temperature", variant.temperature),
        ("sinks", variant.sinks),
        ("alibi.slopes", slopes),
    ):
        if values and shapes.num_heads is not None and len(values) != shapes.num_heads:
            yield Violation(
                f"variant.{field}",
                f"{len(values)} numbers",
                f"one for each of {shapes.num_heads} query heads",
            )
        for index, value in enumerate(values):
            if not math.isfinite(value):
                yield Violation(f"variant.{field}[{index}]", f"{value:g}", "a finite number")
                break


def _hidden_violations(
    given: pb.HiddenInput, config: ModelConfig, max_model_len: int
) -> Iterator[Violation]:
    if given.layer >= config.num_layers:
        yield Violation("hidden.layer", str(given.layer), f"0 to {config.num_layers - 1}")
    if not given.HasField("hidden"):
        yield Violation("hidden.hidden", "unset", "a tensor [tokens, hidden]")
        return
    tensor = given.hidden
    bounds = NumberBounds(size=_LARGEST[config.dtype])
    yield from tensor_violations(
        "hidden.hidden", tensor, dtypes=FLOATING, ranks=(2, 3), bounds=bounds
    )
    if len(tensor.shape) not in (2, 3):
        return
    if tensor.shape[-1] != config.hidden_size:
        yield Violation(
            "hidden.hidden.shape", show_shape(tensor), f"{config.hidden_size} along the last axis"
        )
    if tensor.shape[-2] > max_model_len:
        yield Violation(
            "hidden.hidden.shape", show_shape(tensor), f"at most {max_model_len} tokens"
        )
