"""Requests of GenerationService: every field is checked, all of them at once."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration

from models.tokenizer import Tokenizer
from protos.headroom.v1 import generation_pb2 as pb
from service.engine.engine import EngineRequest
from service.engine.errors import InvalidRequestError, Violation
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import Pooling
from service.engine.validation import (
    MAX_ABS_PRIORITY,
    MAX_TIMEOUT_SECONDS,
    ModelLimits,
    prompt_violations,
    require_decoder,
    sampling_violations,
    token_violations,
)

MAX_REQUEST_ID_CHARS = 128
# No tokenizer in use averages more; longer text is refused before it is tokenized.
_MAX_BYTES_PER_TOKEN = 16

TextRequest: TypeAlias = pb.GenerateRequest | pb.CompleteRequest | pb.ScoreRequest | pb.EmbedRequest
_POOLINGS = {
    int(pb.POOLING_UNSPECIFIED): Pooling.MEAN,
    int(pb.POOLING_MEAN): Pooling.MEAN,
    int(pb.POOLING_LAST): Pooling.LAST,
    int(pb.POOLING_FIRST): Pooling.FIRST,
}


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request: its id, and what the engine is to do."""

    request_id: str
    engine_request: EngineRequest


class RequestDecoder:
    """Reads requests for one model.

    Args:
        tokenizer: the model's.
        limits: the model's.
    """

    def __init__(self, tokenizer: Tokenizer, limits: ModelLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._max_text_bytes = limits.max_model_len * _MAX_BYTES_PER_TOKEN

    def generation(self, request: pb.GenerateRequest | pb.CompleteRequest) -> Call:
        """Check a generation request.

        Raises:
            InvalidRequestError: names every wrong field.
            EncoderModelError: the model does not generate.
        """
        require_decoder(self._limits)
        params = _sampling_params(request.sampling)
        token_ids, violations = self._token_ids(request.WhichOneof("prompt"), request, "prompt")
        max_len = self._limits.max_model_len - 1
        if not violations:
            violations = list(prompt_violations(token_ids, self._limits, max_len=max_len))
        # After a wrong prompt the room for output is unknown; take all of it.
        known = 0 if violations else len(token_ids)
        violations += sampling_violations(params, self._limits, num_prompt_tokens=known)
        return self._call(request, token_ids, params, violations)

    def scoring(self, request: pb.ScoreRequest) -> Call:
        """Check a scoring request.

        Raises:
            InvalidRequestError: names every wrong field.
            EncoderModelError: the model does not score.
        """
        require_decoder(self._limits)
        max_len = self._limits.max_model_len
        token_ids, violations = self._input(request)
        if len(token_ids) == 1:
            violations.append(
                Violation("input", "1 token long", f"2 to {max_len} tokens: the first has no score")
            )
        return self._call(request, token_ids, None, violations)

    def embedding(self, request: pb.EmbedRequest) -> Call:
        """Check an embedding request.

        Raises:
            InvalidRequestError: names every wrong field.
        """
        token_ids, violations = self._input(request)
        pooling = _POOLINGS.get(request.pooling)
        if pooling is None:
            violations.append(Violation("pooling", str(request.pooling), "MEAN, LAST or FIRST"))
        return self._call(request, token_ids, None, violations, pooling)

    def text(self, text: str, field: str = "text") -> str:
        """Check the length of a text that is to be tokenized."""
        violations = self._text_violations(text, field)
        if violations:
            raise InvalidRequestError(violations)
        return text

    def token_ids(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Check token ids that are to become text."""
        most = self._limits.max_model_len
        if len(token_ids) > most:
            violations = [Violation("token_ids", f"{len(token_ids)} ids", f"at most {most}")]
        else:
            violations = list(token_violations("token_ids", token_ids, self._limits))
        if violations:
            raise InvalidRequestError(violations)
        return token_ids

    def _input(
        self, request: pb.ScoreRequest | pb.EmbedRequest
    ) -> tuple[list[int], list[Violation]]:
        """The tokens of a request that wants none in return, and what is wrong with them."""
        token_ids, violations = self._token_ids(request.WhichOneof("input"), request, "input")
        max_len = self._limits.max_model_len
        if not violations:
            violations = list(
                prompt_violations(token_ids, self._limits, max_len=max_len, field="input")
            )
        return token_ids, violations

    def _token_ids(
        self, form: str | None, request: TextRequest, field: str
    ) -> tuple[list[int], list[Violation]]:
        if form is None:
            return [], [Violation(field, "unset", "text or token_ids")]
        if form == "token_ids":
            return list(request.token_ids.ids), []
        if not request.text:
            return [], [Violation(f"{field}.text", "empty", "at least one character")]
        violations = self._text_violations(request.text, f"{field}.text")
        if violations:
            return [], violations
        return self._tokenizer.encode(request.text), []

    def _text_violations(self, text: str, field: str) -> list[Violation]:
        num_bytes = len(text.encode())
        if num_bytes <= self._max_text_bytes:
            return []
        return [Violation(field, f"{num_bytes} bytes long", f"at most {self._max_text_bytes}")]

    def _call(
        self,
        request: TextRequest,
        token_ids: list[int],
        params: SamplingParams | None,
        violations: list[Violation],
        pooling: Pooling | None = None,
    ) -> Call:
        violations = [*violations, *_envelope_violations(request)]
        if violations:
            raise InvalidRequestError(violations)
        timeout = _seconds(request.timeout) if request.HasField("timeout") else None
        request_id = request.request_id or uuid.uuid4().hex
        engine_request = EngineRequest(
            token_ids, params, request.priority, timeout, pooling=pooling, request_id=request_id
        )
        return Call(request_id, engine_request)


def _envelope_violations(request: TextRequest) -> Iterator[Violation]:
    if len(request.request_id) > MAX_REQUEST_ID_CHARS or not request.request_id.isprintable():
        yield Violation(
            "request_id",
            f"{len(request.request_id)} characters long or not printable",
            f"at most {MAX_REQUEST_ID_CHARS} printable characters",
        )
    if abs(request.priority) > MAX_ABS_PRIORITY:
        yield Violation(
            "priority", str(request.priority), f"{-MAX_ABS_PRIORITY} to {MAX_ABS_PRIORITY}"
        )
    if request.HasField("timeout") and not 0 < _seconds(request.timeout) <= MAX_TIMEOUT_SECONDS:
        yield Violation(
            "timeout",
            f"{_seconds(request.timeout):g} s",
            f"more than 0 s, at most {MAX_TIMEOUT_SECONDS:g} s",
        )


def _sampling_params(sampling: pb.SamplingParams) -> SamplingParams:
    """What is set replaces the default; an unset scalar is not 0."""
    scalars = {
        name: getattr(sampling, name)
        for name in (
            "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "ignore_eos",
            "logprobs",
        )
        if sampling.HasField(name)
    }  # fmt: skip
    return SamplingParams(
        **scalars,
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
