"""The RPC methods. One class for both runtimes; each method is named after its RPC."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import structlog
from grpc_health.v1 import health_pb2

from models.tokenizer import IncrementalDetokenizer, Tokenizer
from protos.headroom.v1 import attention_pb2, models_pb2
from protos.headroom.v1 import generation_pb2 as pb
from service import codec
from service.attention.compute import attend
from service.attention.limits import AttentionLimits
from service.auth.gate import Gate
from service.engine.async_engine import AsyncEngine
from service.engine.errors import EngineError, QueueFullError
from service.engine.sequence import FinishReason, SequenceOutput
from service.errors import (
    DeadlinePassedError,
    DuplicateRequestError,
    RequestDrainedError,
    RequestFailedError,
    UnknownHealthServiceError,
)
from service.metrics.rpc import RpcMetrics
from service.metrics.server import States
from service.rpc import Rpc, server_stream, unary

if TYPE_CHECKING:
    from service.tracing import Tracing

_SERVICES = tuple(
    service
    for file in (attention_pb2, pb, models_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
)
HEALTH_SERVICES = ("", *(service.full_name for service in _SERVICES))
_HEALTH_POLL_SECONDS = 0.5


class HeadroomServicer:
    """Serves one model.

    Args:
        engine: started.
        tokenizer: the model's.
        attention_limits: bytes that one attention may take.
        gate: admits the caller of each RPC; None admits all.
        tracing: where spans of RPCs go; None makes none.
        watch_seconds: a health watch ends after so long and the client starts a new one; under
            Ray Serve an endless stream would hold up the shutdown of its replica.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        attention_limits: AttentionLimits,
        *,
        gate: Gate | None = None,
        tracing: "Tracing | None" = None,
        watch_seconds: float = math.inf,
    ) -> None:
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        self.rpc_metrics = RpcMetrics([*_SERVICES, health])
        self.gate = gate
        self.tracing = tracing
        config = engine.engine.served_config
        self.log = structlog.get_logger().bind(model=config.name, heads=config.head_label)
        self._engine = engine
        self._tokenizer = tokenizer
        self._watch_seconds = watch_seconds
        self._decoder = codec.RequestDecoder(tokenizer, engine.engine.limits)
        self._attention_decoder = codec.AttentionDecoder(
            engine.engine.served_config, engine.engine.max_model_len, attention_limits
        )
        self._open_requests: set[tuple[str, str]] = set()
        self._planning: asyncio.Future[models_pb2.PlanCapacityResponse] | None = None

    @server_stream
    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: Rpc
    ) -> AsyncIterator[pb.GenerateResponse]:
        call = self._decoder.generation(request)
        detokenizer = self._detokenizer(call)
        async with aclosing(self._run(call, grpc_context)) as outputs:
            async for output in outputs:
                text = _new_text(detokenizer, output)
                if output.token_ids or text:
                    yield pb.GenerateResponse(delta=codec.token_delta(output, text))
                if output.finish is not None:
                    yield pb.GenerateResponse(finished=codec.finished(output.finish))

    @unary(pb.CompleteResponse)
    async def Complete(self, request: pb.CompleteRequest, grpc_context: Rpc) -> pb.CompleteResponse:
        call = self._decoder.generation(request)
        output = SequenceOutput.merge([output async for output in self._run(call, grpc_context)])
        assert output.finish is not None, "a merged generation has ended"
        return pb.CompleteResponse(
            token_ids=output.token_ids,
            text=_new_text(self._detokenizer(call), output),
            finished=codec.finished(output.finish),
            logprobs=map(codec.token_logprobs, output.logprobs),
        )

    @unary(pb.ScoreResponse)
    async def Score(self, request: pb.ScoreRequest, grpc_context: Rpc) -> pb.ScoreResponse:
        call = self._decoder.scoring(request)
        output = SequenceOutput.merge([output async for output in self._run(call, grpc_context)])
        token_ids = call.engine_request.prompt_token_ids
        text = request.text or self._tokenizer.decode(token_ids)
        return pb.ScoreResponse(
            token_ids=token_ids,
            logprobs=output.prompt_logprobs,
            total_logprob=sum(output.prompt_logprobs),
            num_bytes=len(text.encode()) - self._tokenizer.num_bytes(token_ids[0]),
        )

    @unary(pb.EmbedResponse)
    async def Embed(self, request: pb.EmbedRequest, grpc_context: Rpc) -> pb.EmbedResponse:
        call = self._decoder.embedding(request)
        output = SequenceOutput.merge([output async for output in self._run(call, grpc_context)])
        assert output.finish is not None, "a merged embedding has ended"
        return pb.EmbedResponse(
            embedding=codec.embedding(output, normalize=request.normalize),
            token_ids=call.engine_request.prompt_token_ids,
            usage=codec.usage(output.finish),
        )

    @unary(attention_pb2.AttendResponse)
    async def Attend(
        self, request: attention_pb2.AttendRequest, grpc_context: Rpc
    ) -> attention_pb2.AttendResponse:
        call = self._attention_decoder.call(request)
        result = await self._engine.call(lambda engine: attend(call, engine.model_runner.model))
        return codec.attend_response(result)

    @unary(pb.TokenizeResponse)
    async def Tokenize(self, request: pb.TokenizeRequest, grpc_context: Rpc) -> pb.TokenizeResponse:
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        text = self._decoder.text(request.text)
        token_ids = self._tokenizer.encode(text, add_special_tokens=special)
        tokens = [self._tokenizer.token_of(token_id) or "" for token_id in token_ids]
        return pb.TokenizeResponse(token_ids=token_ids, tokens=tokens)

    @unary(pb.DetokenizeResponse)
    async def Detokenize(
        self, request: pb.DetokenizeRequest, grpc_context: Rpc
    ) -> pb.DetokenizeResponse:
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        token_ids = self._decoder.token_ids(request.token_ids)
        return pb.DetokenizeResponse(
            text=self._tokenizer.decode(token_ids, skip_special_tokens=skip)
        )

    @unary(models_pb2.GetModelResponse)
    async def GetModel(
        self, request: models_pb2.GetModelRequest, grpc_context: Rpc
    ) -> models_pb2.GetModelResponse:
        return codec.model_description(self._engine.engine)

    @unary(models_pb2.GetLoadResponse)
    async def GetLoad(
        self, request: models_pb2.GetLoadRequest, grpc_context: Rpc
    ) -> models_pb2.GetLoadResponse:
        return codec.load_description(self._engine.load)

    @unary(models_pb2.PlanCapacityResponse)
    async def PlanCapacity(
        self, request: models_pb2.PlanCapacityRequest, grpc_context: Rpc
    ) -> models_pb2.PlanCapacityResponse:
        engine = self._engine.engine
        call = codec.planning_call(
            request,
            engine.served_config,
            engine.config,
            engine.kv_cache.nbytes,
            max_output_tokens=codec.MAX_SERVED_OUTPUT_TOKENS,
        )
        if self._planning is not None and not self._planning.done():
            raise QueueFullError(unit="plans", limit=0)
        # A client that goes away does not stop the thread, which still counts.
        self._planning = asyncio.ensure_future(asyncio.to_thread(call.answer))
        return await asyncio.shield(self._planning)

    @unary(health_pb2.HealthCheckResponse)
    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Rpc
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in HEALTH_SERVICES:
            raise UnknownHealthServiceError(request.service, list(HEALTH_SERVICES))
        return health_pb2.HealthCheckResponse(status=self._health())

    @unary(health_pb2.HealthListResponse)
    async def List(
        self, request: health_pb2.HealthListRequest, grpc_context: Rpc
    ) -> health_pb2.HealthListResponse:
        status = health_pb2.HealthCheckResponse(status=self._health())
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(HEALTH_SERVICES, status))

    @server_stream
    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: Rpc
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        known = request.service in HEALTH_SERVICES
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        started = time.monotonic()
        sent: int | None = None
        while True:
            status = self._health() if known else unknown
            if status != sent:
                yield health_pb2.HealthCheckResponse(status=status)
                sent = status
            expired = time.monotonic() - started >= self._watch_seconds
            if expired or self._engine.is_draining:
                return
            await asyncio.sleep(_HEALTH_POLL_SECONDS)

    @property
    def is_healthy(self) -> bool:
        """True only while the engine lives and makes progress."""
        try:
            self._engine.check_health()
        except EngineError:
            return False
        return True

    @property
    def is_serving(self) -> bool:
        """True only while it also takes requests."""
        return self.is_healthy and not self._engine.is_draining

    @property
    def states(self) -> States:
        """What HTTP probes may ask, who have neither token nor certificate."""
        return {"/-/healthz": lambda: self.is_healthy, "/-/ready": lambda: self.is_serving}

    def _health(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        status = health_pb2.HealthCheckResponse
        return status.SERVING if self.is_serving else status.NOT_SERVING

    async def _run(self, call: codec.Call, rpc: Rpc) -> AsyncGenerator[SequenceOutput, None]:
        """Results of a request; an ending without a result becomes an error."""
        rpc.concerns(call.request_id)
        with self._open(rpc.caller, call.request_id):
            # At once, as the answer's later: whoever hangs up has had them all the same.
            rpc.computed(len(call.engine_request.prompt_token_ids))
            num_tokens = 0
            async with aclosing(self._engine.run(call.engine_request)) as outputs:
                async for output in outputs:
                    num_tokens += len(output.token_ids)
                    rpc.computed(len(output.token_ids))
                    if output.finish is not None:
                        rpc.finished(output.finish)
                    reason = output.finish.reason if output.finish else None
                    if reason is FinishReason.ERROR:
                        if output.token_ids:
                            yield output._replace(finish=None)
                        raise RequestFailedError
                    if reason is FinishReason.DEADLINE and num_tokens == 0:
                        raise DeadlinePassedError
                    if reason is FinishReason.CANCELLED and num_tokens == 0:
                        raise RequestDrainedError
                    yield output

    @contextlib.contextmanager
    def _open(self, caller: str, request_id: str) -> Iterator[None]:
        """Each caller names requests without regard to others, and learns nothing of theirs."""
        request = (caller, request_id)
        if request in self._open_requests:
            raise DuplicateRequestError(request_id)
        self._open_requests.add(request)
        try:
            yield
        finally:
            self._open_requests.remove(request)

    def _detokenizer(self, call: codec.Call) -> IncrementalDetokenizer:
        params = call.engine_request.params
        assert params is not None, "a generation has sampling params"
        return IncrementalDetokenizer(
            self._tokenizer,
            params.stop,
            min_tokens=params.min_tokens,
            prompt_token_ids=call.engine_request.prompt_token_ids,
        )


def _new_text(detokenizer: IncrementalDetokenizer, output: SequenceOutput) -> str:
    text = detokenizer.push(output.token_ids)
    return text + detokenizer.flush() if output.finish is not None else text
