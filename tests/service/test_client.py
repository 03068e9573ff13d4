"""The typed clients against a real server, and the typed errors."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
import torch
from google.rpc import code_pb2
from torch.nn import functional

from service.client import (
    AsyncClient,
    Client,
    HeadroomError,
    ReplicaLostError,
    RequestOptions,
    to_error,
)
from tests.serving import RunningServer

T = TypeVar("T")


async def _blocking(server: RunningServer, use: Callable[[Client], T]) -> T:
    """Use the blocking client beside the event loop that serves it."""

    def call() -> T:
        with Client(server.target) as client:
            return use(client)

    return await asyncio.to_thread(call)


async def test_both_clients_answer_alike(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client:
        stream = client.generate("abc", max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
        text = "".join([part async for part in stream])
        answer = await client.complete("abc", max_tokens=8, temperature=0, ignore_eos=True)
        score = await client.score("hello", options=RequestOptions(priority=1))
        vector = await client.embed("hello", pooling="last", normalize=True)
        ids = await client.tokenize("hello")
        back = await client.detokenize(ids)
        model, load = await client.get_model(), await client.get_load()
        assert await client.is_serving(timeout=10)
    assert stream.finished is not None
    assert stream.finished.usage.completion_tokens == len(stream.token_ids) == 8
    assert len(stream.logprobs) == 8
    assert (text, stream.token_ids) == (answer.text, list(answer.token_ids))
    assert back == "hello"

    def use(blocking: Client) -> None:
        again = blocking.generate("abc", max_tokens=8, temperature=0, ignore_eos=True)
        assert "".join(again) == text
        assert again.token_ids == stream.token_ids
        assert blocking.complete("abc", max_tokens=8, temperature=0, ignore_eos=True).text == text
        assert blocking.score("hello").logprobs == score.logprobs
        assert blocking.score(ids).token_ids == score.token_ids
        again_vector = blocking.embed("hello", pooling="last", normalize=True)
        assert np.array_equal(again_vector, vector)
        assert blocking.tokenize("hello") == ids
        assert blocking.detokenize(ids) == "hello"
        assert blocking.get_model() == model
        assert blocking.get_load().kv_blocks_total == load.kv_blocks_total
        assert blocking.is_serving(timeout=10)

    await _blocking(server, use)


async def test_a_server_whose_engine_has_ended_is_not_serving(server: RunningServer) -> None:
    await server.engine.shutdown()
    assert not await _blocking(server, lambda client: client.is_serving(timeout=10))
    async with AsyncClient(server.target) as client:
        assert not await client.is_serving(timeout=10)


async def test_errors_carry_reason_and_fields(server: RunningServer) -> None:
    def use(client: Client) -> HeadroomError:
        with pytest.raises(HeadroomError) as streamed:
            list(client.generate([1], temperature=-1, max_tokens=4))
        with pytest.raises(HeadroomError) as answered:
            client.complete([1], temperature=-1, max_tokens=4)
        assert str(streamed.value) == str(answered.value)
        return answered.value

    error = await _blocking(server, use)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert list(error.violations) == ["sampling.temperature"]
    assert error.retry_after is None
    assert str(error) == "INVALID_ARGUMENT: sampling.temperature is -1; allowed: 0 to 100"


async def test_options_reach_the_server(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client:
        options = RequestOptions(request_id="a\nb", priority=999, timeout=-1.0)
        for call in (
            client.complete([1], options=options, max_tokens=1),
            client.score([1, 2], options=options),
            client.embed([1], options=options),
        ):
            with pytest.raises(HeadroomError) as caught:
                await call
            assert set(caught.value.violations) == {"request_id", "priority", "timeout"}


async def test_blocking_attention_answers_in_kind(server: RunningServer) -> None:
    query = torch.randn(1, 4, 3, 8)
    key, value = torch.randn(2, 1, 2, 3, 8)
    theirs = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )

    def use(client: Client) -> None:
        given = (query, key, value)
        tensors = client.attend(
            *given, layout="batch_heads_tokens_dim", mask="causal", window=[9, None, 3, None]
        )
        arrays = client.attend(
            *(part.numpy() for part in given),
            layout="batch_heads_tokens_dim",
            mask="bidirectional",
            visible=np.tri(3, dtype=bool),
            key_positions=np.arange(3, dtype=np.int32),
            want_lse=True,
        )
        assert isinstance(tensors.output, torch.Tensor)
        assert (tensors.output - theirs).abs().max() <= 2e-6
        assert (tensors.weights, tensors.lse, tensors.head_outputs) == (None, None, None)
        assert isinstance(arrays.output, np.ndarray)
        assert isinstance(arrays.lse, np.ndarray)
        assert np.abs(arrays.output - theirs.numpy()).max() <= 2e-6
        arrays.output[:] = 0  # its own memory
        hidden = client.attend_hidden(torch.randn(3, 64, dtype=torch.float64), layer=0)
        assert hidden.output.dtype is torch.float32, "the model's"
        with pytest.raises(HeadroomError) as caught:
            client.attend_hidden(torch.randn(3, 63), layer=0)
        assert list(caught.value.violations) == ["hidden.hidden.shape"]
        wrong: Any = {"layout": "bhtd", "mask": "causal"}
        with pytest.raises(ValueError, match="LAYOUT_BHTD"):
            client.attend(*given, **wrong)

    await _blocking(server, use)


def test_the_client_needs_no_torch() -> None:
    code = "import sys, service.client; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_cancelling_a_stream_frees_the_server(server: RunningServer) -> None:
    async with AsyncClient(server.target) as client:
        stream = client.generate([1], max_tokens=120, temperature=0, ignore_eos=True)
        async for _ in stream:
            stream.cancel()
            break
    await server.until_idle()


async def test_nobody_there_is_unavailable() -> None:
    def use() -> HeadroomError:
        with Client("127.0.0.1:1") as client, pytest.raises(HeadroomError) as caught:
            client.get_model()
        return caught.value

    assert (await asyncio.to_thread(use)).code is grpc.StatusCode.UNAVAILABLE


class _Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


def test_a_stream_cut_by_the_other_side_is_a_lost_replica() -> None:
    cut = to_error(_Failed(grpc.StatusCode.CANCELLED, "Stream removed (RST_STREAM)"))
    assert isinstance(cut, ReplicaLostError)
    ours = to_error(_Failed(grpc.StatusCode.CANCELLED, "Locally cancelled by application!"))
    assert not isinstance(ours, ReplicaLostError)
    assert ours.code.value[0] == code_pb2.CANCELLED
