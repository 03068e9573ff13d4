"""Wrong requests, each with the field that the answer has to name; one list for all fronts."""

from google.protobuf.duration_pb2 import Duration

from protos.headroom.v1 import generation_pb2 as pb
from tests.checkpoints import VOCAB_SIZE

_PROMPT = pb.TokenIds(ids=[1, 2, 3])


def _sampling(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=_PROMPT, sampling=pb.SamplingParams(**fields))  # type: ignore[arg-type]


NAN = float("nan")

# name: (request, field named in the answer, part of what the answer says is allowed)
BAD_REQUESTS: dict[str, tuple[pb.GenerateRequest, str, str]] = {
    "no prompt": (pb.GenerateRequest(), "prompt", "text or token_ids"),
    "empty text": (pb.GenerateRequest(text=""), "prompt.text", "at least one character"),
    "empty ids": (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt", "1 to 127 tokens"),
    "unknown token": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])),
        "prompt.token_ids[1]",
        f"0 to {VOCAB_SIZE - 1}",
    ),
    "prompt too long": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 128)),
        "prompt",
        "1 to 127 tokens",
    ),
    "text too long": (pb.GenerateRequest(text="x" * 10_000), "prompt.text", "at most 2048"),
    "max_tokens 0": (_sampling(max_tokens=0), "sampling.max_tokens", "1 to 125"),
    "max_tokens beyond": (_sampling(max_tokens=126), "sampling.max_tokens", "1 to 125"),
    "max_tokens huge": (_sampling(max_tokens=2**32 - 1), "sampling.max_tokens", "1 to 125"),
    "min_tokens": (_sampling(min_tokens=5, max_tokens=4), "sampling.min_tokens", "0 to 4"),
    "min_tokens alone": (_sampling(min_tokens=126), "sampling.min_tokens", "0 to 125"),
    "temperature": (_sampling(temperature=-0.5), "sampling.temperature", "0 to 100"),
    "temperature nan": (_sampling(temperature=NAN), "sampling.temperature", "0 to 100"),
    "temperature inf": (_sampling(temperature=float("inf")), "sampling.temperature", "0 to 100"),
    "top_p 0": (_sampling(top_p=0), "sampling.top_p", "above 0, at most 1"),
    "top_p nan": (_sampling(top_p=NAN), "sampling.top_p", "above 0, at most 1"),
    "min_p": (_sampling(min_p=1.5), "sampling.min_p", "0 to 1"),
    "top_k": (_sampling(top_k=VOCAB_SIZE + 1), "sampling.top_k", f"0 (off) to {VOCAB_SIZE}"),
    "repetition": (_sampling(repetition_penalty=0), "sampling.repetition_penalty", "0.01 to 100"),
    "presence": (_sampling(presence_penalty=-3), "sampling.presence_penalty", "-2 to 2"),
    "frequency": (_sampling(frequency_penalty=NAN), "sampling.frequency_penalty", "-2 to 2"),
    "logprobs": (_sampling(logprobs=21), "sampling.logprobs", "0 to 20"),
    "10,000 stops": (_sampling(stop=["s"] * 10_000), "sampling.stop", "at most 16"),
    "empty stop": (_sampling(stop=["a", ""]), "sampling.stop[1]", "1 to 256 characters"),
    "long stop": (_sampling(stop=["x" * 257]), "sampling.stop[0]", "1 to 256 characters"),
    "stop id": (
        _sampling(stop_token_ids=[VOCAB_SIZE]),
        "sampling.stop_token_ids[0]",
        f"0 to {VOCAB_SIZE - 1}",
    ),
    "allowed id": (
        _sampling(allowed_token_ids=[0, 2**32 - 1]),
        "sampling.allowed_token_ids[1]",
        f"0 to {VOCAB_SIZE - 1}",
    ),
    "bias id": (
        _sampling(logit_bias={VOCAB_SIZE: 1.0}),
        f"sampling.logit_bias[{VOCAB_SIZE}]",
        "token ids 0 to",
    ),
    "bias value": (_sampling(logit_bias={7: NAN}), "sampling.logit_bias[7]", "-100 to 100"),
    "priority": (
        pb.GenerateRequest(token_ids=_PROMPT, priority=101),
        "priority",
        "-100 to 100",
    ),
    "timeout 0": (
        pb.GenerateRequest(token_ids=_PROMPT, timeout=Duration()),
        "timeout",
        "more than 0 s",
    ),
    "timeout negative": (
        pb.GenerateRequest(token_ids=_PROMPT, timeout=Duration(seconds=-1)),
        "timeout",
        "more than 0 s",
    ),
    "timeout long": (
        pb.GenerateRequest(token_ids=_PROMPT, timeout=Duration(seconds=3601)),
        "timeout",
        "at most 3600 s",
    ),
    "request id": (
        pb.GenerateRequest(token_ids=_PROMPT, request_id="x" * 129),
        "request_id",
        "at most 128",
    ),
    "request id line": (
        pb.GenerateRequest(token_ids=_PROMPT, request_id="a\nb"),
        "request_id",
        "printable",
    ),
}
