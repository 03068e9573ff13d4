"""Every wrong attention request is refused by name, over a real channel, and harms nobody."""

import grpc
import pytest

from protos.headroom.v1 import attention_pb2 as pb
from service.client import HeadroomError, to_error
from tests import bad_attention
from tests.bad_attention import BAD_ATTENTION
from tests.serving import RunningServer


async def _refusal(server: RunningServer, request: pb.AttendRequest) -> HeadroomError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.attention.Attend(request)
    return to_error(caught.value)


async def test_right_requests_are_taken(server: RunningServer) -> None:
    for request in (bad_attention.qkv_request(), bad_attention.hidden_request()):
        assert (await server.attention.Attend(request)).backend == "dense"


@pytest.mark.parametrize("name", BAD_ATTENTION)
async def test_a_wrong_field_is_named(server: RunningServer, name: str) -> None:
    request, field, allowed = BAD_ATTENTION[name]
    error = await _refusal(server, request)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert field in error.violations
    assert allowed in error.violations[field].split("allowed: ")[1]
    assert len(str(error)) < 4000, "it has to fit into metadata"


_EACH_DATA = {f"qkv.{name}.data" for name in ("query", "key", "value")}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nan", {"qkv.key.data"}),
        ("inf in float16", _EACH_DATA),
        ("nan in bfloat16", _EACH_DATA),
        ("two dtypes", {"qkv.value.dtype"}),
        ("window 0", {"variant.window"}),
        ("odd rotary_dim", {"variant.rope.rotary_dim"}),
        ("layer", {"hidden.layer"}),
    ],
)
async def test_nothing_else_is_blamed(server: RunningServer, name: str, fields: set[str]) -> None:
    assert set((await _refusal(server, BAD_ATTENTION[name][0])).violations) == fields


@pytest.mark.parametrize(
    ("name", "given"),
    [("nan", "nan at [1, 0, 4, 7]"), ("inf in float16", "-inf at [0, 1, 2, 3]")],
)
async def test_the_index_of_a_bad_number_is_named(
    server: RunningServer, name: str, given: str
) -> None:
    request, field, _ = BAD_ATTENTION[name]
    assert f"is {given};" in (await _refusal(server, request)).violations[field]


async def test_all_wrong_fields_are_named_at_once(server: RunningServer) -> None:
    request = bad_attention.qkv_request()
    request.qkv.query.data += b"x"
    request.qkv.value.dtype = "DATA_TYPE_BOOL"  # type: ignore[assignment]
    request.qkv.key.shape[1] = 3
    request.want_head_outputs = True
    request.variant.MergeFrom(
        pb.Variant(window=0, softcap=-1, scale=bad_attention.NAN, sinks=[1], key_lengths=[9, 9])
    )
    request.variant.rope.rotary_dim = 3
    assert set((await _refusal(server, request)).violations) == {
        "qkv.query.data",
        "qkv.key.data",
        "qkv.key.shape",
        "qkv.value.dtype",
        "qkv.value.shape",
        "want_head_outputs",
        "variant.window",
        "variant.softcap",
        "variant.scale",
        "variant.sinks",
        "variant.key_lengths[0]",
        "variant.rope.rotary_dim",
    }
