"""A typed Python client, blocking and asyncio.

from service.client import Client

with Client("127.0.0.1:9000") as client:
    for text in client.generate("def main(", max_tokens=64, temperature=0):
        print(text, end="")
"""

import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypedDict, TypeVar, Unpack, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import generation_pb2_grpc, models_pb2, models_pb2_grpc

T = TypeVar("T")
Prompt = str | Sequence[int]
DEFAULT_APPLICATION = "headroom"
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Sampling(TypedDict, total=False):
    """Fields of `headroom.v1.SamplingParams`; see generation.proto for ranges and defaults."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What surrounds a request: its id, its urgency, and how long it may take on the server."""

    request_id: str = ""
    priority: int = 0
    timeout: float | None = None


class HeadroomError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status code.
        reason: the stable reason from the server's catalogue, for example `QUEUE_FULL`; empty if
            the error did not come from the server's own code.
        violations: wrong fields and what is allowed, by field name.
        retry_after: seconds after which trying again may help, if it may.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        violations: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.code = code
        self.reason = reason
        self.violations = dict(violations or {})
        self.retry_after = retry_after
        super().__init__(f"{code.name}: {message}")


class ReplicaLostError(HeadroomError):
    """The replica ended while it answered; what arrived before is valid. Trying again may help."""


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


class _Calls:
    """Stubs and metadata that both clients share."""

    def __init__(self, channel: Any, application: str, token: str | None) -> None:
        self._channel = channel
        self._generation = generation_pb2_grpc.GenerationServiceStub(channel)
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        # Ray Serve routes by this key; a server with several applications needs it.
        self._metadata = [("application", application)]
        if token is not None:
            self._metadata.append(("authorization", f"Bearer {token}"))


class Client(_Calls):
    """Blocking client.

    Args:
        target: `host:port`.
        application: the served application, when a server has several.
        token: bearer token.
        tls: channel credentials; None talks in clear text.
    """

    def __init__(
        self,
        target: str,
        *,
        application: str = DEFAULT_APPLICATION,
        token: str | None = None,
        tls: grpc.ChannelCredentials | None = None,
    ) -> None:
        channel = (
            grpc.insecure_channel(target, _channel_options())
            if tls is None
            else grpc.secure_channel(target, tls, _channel_options())
        )
        super().__init__(channel, application, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        options: RequestOptions | None = None,
        **sampling: Unpack[Sampling],
    ) -> TextStream:
        """Stream the text that continues a prompt (text or token ids)."""
        request = _generation_request(pb.GenerateRequest, prompt, options, sampling)
        return TextStream(self._generation.Generate(request, metadata=self._metadata))

    def complete(
        self,
        prompt: Prompt,
        *,
        options: RequestOptions | None = None,
        **sampling: Unpack[Sampling],
    ) -> pb.CompleteResponse:
        """Continue a prompt and return everything at once."""
        request = _generation_request(pb.CompleteRequest, prompt, options, sampling)
        return self._call(self._generation.Complete, request)  # type: ignore[no-any-return]

    def score(self, text: Prompt) -> pb.ScoreResponse:
        """Log-probabilities of the tokens of a text."""
        return self._call(self._generation.Score, _score_request(text))  # type: ignore[no-any-return]

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._call(self._generation.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call(self._generation.Detokenize, request).text  # type: ignore[no-any-return]

    def get_model(self) -> models_pb2.GetModelResponse:
        return self._call(self._models.GetModel, models_pb2.GetModelRequest())  # type: ignore[no-any-return]

    def get_load(self) -> models_pb2.GetLoadResponse:
        return self._call(self._models.GetLoad, models_pb2.GetLoadRequest())  # type: ignore[no-any-return]

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error


class AsyncClient(_Calls):
    """Asyncio client; the same methods as `Client`, awaited."""

    def __init__(
        self,
        target: str,
        *,
        application: str = DEFAULT_APPLICATION,
        token: str | None = None,
        tls: grpc.ChannelCredentials | None = None,
    ) -> None:
        channel = (
            grpc.aio.insecure_channel(target, _channel_options())
            if tls is None
            else grpc.aio.secure_channel(target, tls, _channel_options())
        )
        super().__init__(channel, application, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        options: RequestOptions | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncTextStream:
        request = _generation_request(pb.GenerateRequest, prompt, options, sampling)
        return AsyncTextStream(self._generation.Generate(request, metadata=self._metadata))

    async def complete(
        self,
        prompt: Prompt,
        *,
        options: RequestOptions | None = None,
        **sampling: Unpack[Sampling],
    ) -> pb.CompleteResponse:
        request = _generation_request(pb.CompleteRequest, prompt, options, sampling)
        return await self._call(self._generation.Complete, request)  # type: ignore[no-any-return]

    async def score(self, text: Prompt) -> pb.ScoreResponse:
        return await self._call(self._generation.Score, _score_request(text))  # type: ignore[no-any-return]

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._call(self._generation.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> str:
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._generation.Detokenize, request)).text  # type: ignore[no-any-return]

    async def get_model(self) -> models_pb2.GetModelResponse:
        return await self._call(self._models.GetModel, models_pb2.GetModelRequest())  # type: ignore[no-any-return]

    async def get_load(self) -> models_pb2.GetLoadResponse:
        return await self._call(self._models.GetLoad, models_pb2.GetLoadRequest())  # type: ignore[no-any-return]

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error


def to_error(error: grpc.RpcError) -> HeadroomError:
    """The typed form of a failed call, with what its google.rpc details say."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or ""
    reason, violations, retry_after = "", {}, None
    status = rpc_status.from_call(cast(grpc.Call, error))
    for packed in status.details if status is not None else ():
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if packed.Unpack(info):
            reason = info.reason
        elif packed.Unpack(bad):
            violations = {v.field: v.description for v in bad.field_violations}
        elif packed.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    # A replica that is killed shows as CANCELLED by the other side, not by us.
    lost = code is grpc.StatusCode.CANCELLED and not message.startswith("Locally cancelled")
    kind = ReplicaLostError if lost and not reason else HeadroomError
    return kind(code, message, reason=reason, violations=violations, retry_after=retry_after)


def _generation_request(
    message: Callable[..., T],
    prompt: Prompt,
    options: RequestOptions | None,
    sampling: Mapping[str, Any],
) -> T:
    options = options or RequestOptions()
    request: Any = message(
        request_id=options.request_id,
        priority=options.priority,
        sampling=pb.SamplingParams(**sampling),
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    if options.timeout is not None:
        if not math.isfinite(options.timeout):
            raise ValueError(f"timeout is {options.timeout}; allowed: a finite number of seconds")
        duration = Duration()
        duration.FromNanoseconds(round(options.timeout * 1e9))
        request.timeout.CopyFrom(duration)
    return request  # type: ignore[no-any-return]


def _score_request(text: Prompt) -> pb.ScoreRequest:
    if isinstance(text, str):
        return pb.ScoreRequest(text=text)
    return pb.ScoreRequest(token_ids=pb.TokenIds(ids=text))


def _channel_options() -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES)]
