"""The asyncio client."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, Unpack

import grpc
import numpy as np
import numpy.typing as npt
from grpc_health.v1 import health_pb2

from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import models_pb2
from service.client.attention import (
    A,
    Attended,
    Attending,
    AttentionVariant,
    Layout,
    attend_request,
    attended,
    hidden_request,
)
from service.client.calls import DEFAULT_APPLICATION, Calls, channel_options, is_serving
from service.client.errors import to_error
from service.client.planning import Planning, Shape, plan_request
from service.client.requests import (
    Pooling,
    Prompt,
    RequestOptions,
    Sampling,
    embed_request,
    generation_request,
    score_request,
)
from service.client.streams import AsyncTextStream


class AsyncClient(Calls):
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
            grpc.aio.insecure_channel(target, channel_options())
            if tls is None
            else grpc.aio.secure_channel(target, tls, channel_options())
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
        request = generation_request(pb.GenerateRequest, prompt, options, sampling)
        return AsyncTextStream(self._generation.Generate(request, metadata=self._metadata))

    async def complete(
        self,
        prompt: Prompt,
        *,
        options: RequestOptions | None = None,
        **sampling: Unpack[Sampling],
    ) -> pb.CompleteResponse:
        request = generation_request(pb.CompleteRequest, prompt, options, sampling)
        return await self._call(self._generation.Complete, request)  # type: ignore[no-any-return]

    async def score(
        self, text: Prompt, *, options: RequestOptions | None = None
    ) -> pb.ScoreResponse:
        request = score_request(text, options)
        return await self._call(self._generation.Score, request)  # type: ignore[no-any-return]

    async def embed(
        self,
        text: Prompt,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        options: RequestOptions | None = None,
    ) -> npt.NDArray[np.float32]:
        request = embed_request(text, pooling, normalize, options)
        response = await self._call(self._generation.Embed, request)
        return np.array(response.embedding, dtype=np.float32)

    async def attend(
        self, query: A, key: A, value: A, *, layout: Layout, **variant: Unpack[AttentionVariant]
    ) -> Attended[A]:
        request = attend_request(query, key, value, layout, variant)
        return attended(await self._call(self._attention.Attend, request), query)

    async def attend_hidden(
        self, hidden: A, *, layer: int, **attending: Unpack[Attending]
    ) -> Attended[A]:
        request = hidden_request(hidden, layer, attending)
        return attended(await self._call(self._attention.Attend, request), hidden)

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

    async def is_serving(self, *, timeout: float | None = None) -> bool:
        check = partial(self._health.Check, timeout=timeout)
        return is_serving(await self._call(check, health_pb2.HealthCheckRequest()))

    async def plan_capacity(
        self, mix: Sequence[Shape], **planning: Unpack[Planning]
    ) -> models_pb2.PlanCapacityResponse:
        request = plan_request(mix, planning)
        return await self._call(self._models.PlanCapacity, request)  # type: ignore[no-any-return]

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
