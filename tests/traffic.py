"""Requests that end in every way, what clients see of them, and what metrics must say then."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch

from protos.headroom.v1 import generation_pb2 as pb
from service.client import to_error
from service.client.requests import RequestOptions, generation_request
from service.errors import REFUSAL_REASONS
from tests import checkpoints

# Whatever reads its embedding is not a number.
BROKEN_TOKEN = 200
EOS = checkpoints.LLAMA["eos_token_id"]
METHODS = ("Generate", "Complete", "Score", "Embed")
Total = Callable[..., float]


def save_model(path: Path) -> Path:
    """A checkpoint with a token that breaks the request that contains it."""
    model = checkpoints.llama(max_position_embeddings=4096)
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN_TOKEN] = torch.nan
    return checkpoints.save(model, path / "tiny-gqa")


def greedy(prompt: list[int], timeout: float | None = None, **sampling: Any) -> pb.GenerateRequest:
    options = RequestOptions(timeout=timeout)
    settings = {"temperature": 0.0, "ignore_eos": True, "logit_bias": {BROKEN_TOKEN: -100.0}}
    return generation_request(pb.GenerateRequest, prompt, options, {**settings, **sampling})


def every_ending() -> list[pb.GenerateRequest]:
    """Generations that end in every way but by a client that goes away."""
    return [
        greedy([1, 2], allowed_token_ids=[EOS], ignore_eos=False),
        greedy([1, 2, 3], stop_token_ids=[5], allowed_token_ids=[5]),
        greedy([1] * 40),
        greedy([1], timeout=0.02),
        greedy([1], timeout=1e-6),
        greedy([BROKEN_TOKEN]),
        greedy([1, 2, 3, 4], allowed_token_ids=[BROKEN_TOKEN], logit_bias={}),
        greedy([1], temperature=200.0),
        *(greedy([n] * n, max_tokens=n) for n in range(1, 25)),
    ]


@dataclass(slots=True)
class Seen:
    """What clients saw, in numbers that a server must have counted too."""

    reasons: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    first_tokens: int = 0

    async def generate(self, stub: Any, request: pb.GenerateRequest) -> None:
        """Read a whole stream."""
        tokens = 0
        try:
            async for response in stub.Generate(request):
                self.messages["Generate"] += 1
                tokens += len(response.delta.token_ids)
                if response.HasField("finished"):
                    self._ended("Generate", response.finished)
                    assert response.finished.usage.completion_tokens == tokens
        except grpc.aio.AioRpcError as error:
            self._failed("Generate", error)
        if tokens:
            self.prompt_tokens += len(request.token_ids.ids)
            self.first_tokens += 1
        self.generation_tokens += tokens

    async def complete(self, stub: Any, request: pb.GenerateRequest) -> None:
        answer = await stub.Complete(pb.CompleteRequest.FromString(request.SerializeToString()))
        self.messages["Complete"] += 1
        self._ended("Complete", answer.finished)
        self.prompt_tokens += answer.finished.usage.prompt_tokens
        self.generation_tokens += answer.finished.usage.completion_tokens
        self.first_tokens += 1

    async def score_and_embed(self, stub: Any, token_ids: list[int]) -> None:
        ids = pb.TokenIds(ids=token_ids)
        await stub.Score(pb.ScoreRequest(token_ids=ids))
        await stub.Embed(pb.EmbedRequest(token_ids=ids))
        for method in ("Score", "Embed"):
            self.messages[method] += 1
            self.codes[method, "OK"] += 1
            self.reasons["length"] += 1
            self.prompt_tokens += len(token_ids)

    async def cancel(self, stub: Any) -> None:
        """Leave a stream after its first message; how many tokens there were nobody knows."""
        call = stub.Generate(greedy([1]))
        await call.read()
        call.cancel()
        self.reasons["cancelled"] += 1
        self.codes["Generate", "CANCELLED"] += 1

    async def everything(self, stub: Any) -> None:
        """All that can be counted exactly."""
        await asyncio.gather(
            *(self.generate(stub, request) for request in every_ending()),
            *(self.complete(stub, greedy([n], max_tokens=n)) for n in range(1, 5)),
            *(self.score_and_embed(stub, [n] * n) for n in range(2, 6)),
        )

    def check_ends(self, total: Total) -> None:
        """The ends of requests and RPCs, cancelled ones included.

        Args:
            total: the sum of a metric's series with given labels.
        """
        for reason in ("eos", "stop", "length", "context_full", "deadline", "cancelled", "error"):
            counted = total("headroom_request_success_total", finish_reason=reason)
            assert counted == self.reasons[reason], reason
        for reason in REFUSAL_REASONS:
            counted = total("headroom_requests_rejected_total", reason=reason)
            assert counted == self.refused[reason], reason
        assert total("headroom_e2e_request_latency_seconds_count") == self.reasons.total()
        assert total("headroom_request_queue_time_seconds_count") == self.reasons.total()
        for method in METHODS:
            ended = 0
            for code in grpc.StatusCode:
                counted = total(
                    "grpc_server_handled_total", grpc_method=method, grpc_code=code.name
                )
                assert counted == self.codes[method, code.name], (method, code)
                ended += self.codes[method, code.name]
            for name in ("started_total", "msg_received_total", "handling_seconds_count"):
                assert total(f"grpc_server_{name}", grpc_method=method) == ended, (method, name)

    def check_tokens(self, total: Total) -> None:
        """Tokens and messages, as long as nobody has left a stream."""
        assert total("headroom_prompt_tokens_total") == self.prompt_tokens
        assert total("headroom_generation_tokens_total") == self.generation_tokens
        assert total("headroom_request_generation_tokens_sum") == self.generation_tokens
        assert total("headroom_time_to_first_token_seconds_count") == self.first_tokens
        gaps = self.generation_tokens - self.first_tokens
        assert total("headroom_inter_token_latency_seconds_count") == gaps
        for method in METHODS:
            sent = total("grpc_server_msg_sent_total", grpc_method=method)
            assert sent == self.messages[method], method

    def _ended(self, method: str, finished: pb.Finished) -> None:
        name = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_")
        self.reasons[name.lower()] += 1
        self.codes[method, "OK"] += 1

    def _failed(self, method: str, error: grpc.aio.AioRpcError) -> None:
        self.codes[method, error.code().name] += 1
        reason = to_error(error).reason.lower()
        ending = {"nonfinite_logits": "error", "deadline": "deadline"}.get(reason)
        if ending is None:
            self.refused[reason] += 1
        else:
            self.reasons[ending] += 1
