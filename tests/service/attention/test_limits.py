"""What an attention takes is known from its shapes, and too much is refused before it exists."""

import resource
from pathlib import Path

import grpc
import numpy as np
import pytest

from models.transformer import Transformer
from protos.headroom.v1 import attention_pb2 as pb
from service.attention.compute import attend
from service.attention.limits import AttentionLimits, check_size, footprint_of
from service.attention.request import AttentionCall, HiddenInput, QKVInput, Variant, Wanted
from service.client import to_error
from service.codec import AttentionDecoder
from service.errors import AttentionTooLargeError
from service.tensors import WireArray
from tests.bad_attention import hidden_request, qkv_request, tensor
from tests.engine import tiny
from tests.serving import RunningServer, running_server

SHAPES = ((2, 6, 3, 8), (2, 2, 5, 8), (2, 2, 5, 4))


def _call(dtype: str = "float32", **wanted: bool) -> AttentionCall:
    query, key, value = (WireArray(dtype, np.zeros(shape, dtype)) for shape in SHAPES)
    given = QKVInput(query, key, value, axes=(0, 1, 2, 3))
    return AttentionCall(given, Variant(causal=True), Wanted(**wanted))


@pytest.mark.parametrize(("dtype", "size", "wide"), [("float32", 4, 4), ("float64", 8, 8),
                                                     ("float16", 2, 4)])  # fmt: skip
def test_footprint_of_queries_keys_and_values(dtype: str, size: int, wide: int) -> None:
    footprint = footprint_of(_call(dtype, weights=True, lse=True), tiny.CONFIG)
    assert footprint.input == (2 * 6 * 3 * 8 + 2 * 2 * 5 * 8 + 2 * 2 * 5 * 4) * size
    assert footprint.intermediate == 2 * 6 * (3 * 5 * wide + 5 * (8 + 4) * size)
    assert footprint.answer == 2 * 6 * 3 * (4 * size + 5 * wide + wide)


def test_one_byte_decides() -> None:
    call = _call(weights=True)
    footprint = footprint_of(call, tiny.CONFIG)
    answer = footprint.answer + 1024
    check_size(call, tiny.CONFIG, AttentionLimits(footprint.total, answer))
    with pytest.raises(AttentionTooLargeError, match=rf"take {footprint.total} bytes.*attend_max"):
        check_size(call, tiny.CONFIG, AttentionLimits(footprint.total - 1, answer))
    with pytest.raises(AttentionTooLargeError, match=rf"take {answer} bytes.*max_message_bytes"):
        check_size(call, tiny.CONFIG, AttentionLimits(footprint.total, answer - 1))


def test_footprint_of_a_layer_counts_what_single_heads_write() -> None:
    hidden = HiddenInput(WireArray("float32", np.zeros((3, 7, 32), np.float32)), layer=0)
    fused = footprint_of(AttentionCall(hidden, None, Wanted()), tiny.CONFIG)
    split = footprint_of(
        AttentionCall(hidden, None, Wanted(split=True, head_outputs=True)), tiny.CONFIG
    )
    assert fused.input == fused.answer == 3 * 7 * 32 * 4
    assert fused.intermediate == 3 * 4 * (7 * 7 + 3 * 7 * 8) * 4
    assert split.intermediate - fused.intermediate == 3 * 4 * 7 * 32 * 4
    assert split.answer - fused.answer == 3 * 4 * 7 * 32 * 4


def _long(num_tokens: int) -> pb.AttendRequest:
    """Few bytes on the wire, and many scores."""
    request = qkv_request()
    for name in ("query", "key", "value"):
        given = tensor("FLOAT16", np.zeros((1, 1, num_tokens, 1), "<f2"))
        getattr(request.qkv, name).CopyFrom(given)
    return request


@pytest.mark.parametrize("implementation", ["IMPLEMENTATION_FUSED", "IMPLEMENTATION_SPLIT"])
async def test_many_gigabytes_are_refused_before_they_are_allocated(
    server: RunningServer, implementation: str
) -> None:
    request = _long(150_000)
    request.implementation = implementation  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.attention.Attend(request)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024, "kibibytes"
    error = to_error(caught.value)
    assert (error.code, error.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "ATTENTION_TOO_LARGE",
    )
    needed = 4 * 150_000**2 + 6 * 150_000 * 2  # scores; query, keys, values and output
    assert f"would take {needed} bytes; this server allows {64 * 2**20}" in str(error)
    assert "attend_max_bytes" in str(error)


def _grown(request: pb.AttendRequest, model: Transformer) -> int:
    """MiB by which this process grows while a request is computed."""
    decoder = AttentionDecoder(tiny.CONFIG, tiny.MAX_LEN, AttentionLimits(64 * 2**20, 2**30))
    call = decoder.call(request)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend(call, model)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def test_one_query_over_many_packed_keys_takes_little() -> None:
    """A mask of all keys by all keys would take 900 MB."""
    request = _long(30_000)
    request.qkv.query.CopyFrom(tensor("FLOAT16", np.zeros((1, 1, 1, 1), "<f2")))
    request.variant.segment_ids.CopyFrom(tensor("INT64", np.zeros(30_000, "<i8")))
    assert _grown(request, tiny.tiny_model()) < 100


def test_many_heads_on_one_key_count_its_copies() -> None:
    """Their scores alone would fit."""
    request = qkv_request()
    for name, heads in (("query", 2000), ("key", 1), ("value", 1)):
        tokens = 1 if name == "query" else 2000
        given = tensor("FLOAT16", np.zeros((1, heads, tokens, 64), "<f2"))
        getattr(request.qkv, name).CopyFrom(given)
    with pytest.raises(AttentionTooLargeError, match="attend_max_bytes"):
        _grown(request, tiny.tiny_model())


async def test_an_answer_that_fits_no_message_is_refused(server: RunningServer) -> None:
    request = _long(600)
    assert (await server.attention.Attend(request)).backend == "dense"
    request.want_weights = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.attention.Attend(request)
    error = to_error(caught.value)
    assert error.reason == "ATTENTION_TOO_LARGE"
    assert f"the answer of this attention would take {600 * 600 * 4 + 600 * 2 + 1024}" in str(error)
    assert "(max_message_bytes)" in str(error)


async def test_the_limit_is_a_setting(model_path: Path) -> None:
    request = hidden_request()
    request.want_weights = True
    async with running_server(model_path, attend_max_bytes=4096) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await server.attention.Attend(request)
    assert "this server allows 4096 (attend_max_bytes)" in str(to_error(caught.value))
