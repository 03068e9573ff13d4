"""The blocking client."""

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
from service.client.streams import TextStream


class Client(Calls):
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
            grpc.insecure_channel(target, channel_options())
            if tls is None
            else grpc.secure_channel(target, tls, channel_options())
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
        request = generation_request(pb.GenerateRequest, prompt, options, sampling)
        return TextStream(self._generation.Generate(request, metadata=self._metadata))

    def complete(
        self,
        prompt: Prompt,
        *,
        options: RequestOptions | None = None,
        **sampling: Unpack[Sampling],
    ) -> pb.CompleteResponse:
        """Continue a prompt and return everything at once."""
        request = generation_request(pb.CompleteRequest, prompt, options, sampling)
        return self._call(self._generation.Complete, request)  # type: ignore[no-any-return]

    def score(self, text: Prompt, *, options: RequestOptions | None = None) -> pb.ScoreResponse:
        """Log-probabilities of the tokens of a text."""
        request = score_request(text, options)
        return self._call(self._generation.Score, request)  # type: ignore[no-any-return]

    def embed(
        self,
        text: Prompt,
        *,
        pooling: Pooling = "mean",
        normalize: bool = False,
        options: RequestOptions | None = None,
    ) -> npt.NDArray[np.float32]:
        """The text as one vector, float32 `[hidden_size]`."""
        request = embed_request(text, pooling, normalize, options)
        response = self._call(self._generation.Embed, request)
        return np.array(response.embedding, dtype=np.float32)

    def attend(
        self, query: A, key: A, value: A, *, layout: Layout, **variant: Unpack[AttentionVariant]
    ) -> Attended[A]:
        """Attention of queries, keys and values, all NumPy arrays or all torch tensors.

        See `AttentionVariant` for the keywords; `mask` is required.
        """
        request = attend_request(query, key, value, layout, variant)
        return attended(self._call(self._attention.Attend, request), query)

    def attend_hidden(
        self, hidden: A, *, layer: int, **attending: Unpack[Attending]
    ) -> Attended[A]:
        """One layer's attention of what its norm hands to it.

        Args:
            hidden: `[tokens, hidden]` or `[batch, tokens, hidden]`.
        """
        request = hidden_request(hidden, layer, attending)
        return attended(self._call(self._attention.Attend, request), hidden)

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

    def is_serving(self, *, timeout: float | None = None) -> bool:
        """Whether the engine makes progress.

        Args:
            timeout: an error if nobody has answered after so many seconds.
        """
        check = partial(self._health.Check, timeout=timeout)
        return is_serving(self._call(check, health_pb2.HealthCheckRequest()))

    def plan_capacity(
        self, mix: Sequence[Shape], **planning: Unpack[Planning]
    ) -> models_pb2.PlanCapacityResponse:
        """What the served model, or a variant of it, holds of a mix of requests, and how fast."""
        request = plan_request(mix, planning)
        return self._call(self._models.PlanCapacity, request)  # type: ignore[no-any-return]

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error) from error
