"""The text of one generation, as it arrives."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from protos.headroom.v1 import generation_pb2 as pb
from service.client.errors import to_error


class TextStream:
    """Text of one generation as it arrives.

    Attributes:
        token_ids: all tokens so far.
        logprobs: one per token, if asked for.
        finished: reason, usage and timings, once the iteration has ended.
    """

    def __init__(self, call: Any) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[pb.TokenLogprobs] = []
        self.finished: pb.Finished | None = None
        self._call = call

    def cancel(self) -> None:
        """Stop the generation on the server."""
        self._call.cancel()

    def __iter__(self) -> Iterator[str]:
        try:
            for response in self._call:
                text = self._take(response)
                if text:
                    yield text
        except grpc.RpcError as error:
            raise to_error(error) from error
        finally:
            self._call.cancel()  # whoever stops reading stops the generation

    def _take(self, response: pb.GenerateResponse) -> str:
        if response.HasField("finished"):
            self.finished = response.finished
            return ""
        self.token_ids.extend(response.delta.token_ids)
        self.logprobs.extend(response.delta.logprobs)
        return response.delta.text


class AsyncTextStream(TextStream):
    """`TextStream` for `async for`."""

    def __iter__(self) -> Iterator[str]:
        raise TypeError("this stream is asynchronous: use `async for`")

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for response in self._call:
                text = self._take(response)
                if text:
                    yield text
        except grpc.RpcError as error:
            raise to_error(error) from error
        finally:
            self._call.cancel()
