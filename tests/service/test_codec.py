"""Protobuf to domain and back: defaults, unset fields, and every ending."""

import pytest
from google.protobuf.duration_pb2 import Duration

from protos.headroom.v1 import generation_pb2 as pb
from service import codec
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import Finish, FinishReason, Timings, Usage
from service.engine.validation import ModelLimits
from tests.checkpoints import VOCAB_SIZE, headroom_byte_tokenizer

LIMITS = ModelLimits(vocab_size=VOCAB_SIZE, max_model_len=128)


@pytest.fixture
def decoder() -> codec.RequestDecoder:
    return codec.RequestDecoder(headroom_byte_tokenizer(), LIMITS)


def test_unset_fields_have_the_defaults_of_the_engine(decoder: codec.RequestDecoder) -> None:
    call = decoder.generation(pb.GenerateRequest(text="ab"))
    assert call.engine_request.params == SamplingParams()
    assert list(call.engine_request.prompt_token_ids) == headroom_byte_tokenizer().encode("ab")
    assert (call.engine_request.priority, call.engine_request.timeout) == (0, None)
    assert len(call.request_id) == 32, "the server has chosen an id"


def test_set_fields_reach_the_engine_even_if_they_are_zero(decoder: codec.RequestDecoder) -> None:
    request = pb.GenerateRequest(
        request_id="mine",
        token_ids=pb.TokenIds(ids=[3, 1]),
        sampling=pb.SamplingParams(
            max_tokens=5, min_tokens=1, temperature=0, top_k=4, top_p=0.5, min_p=0.25,
            repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, seed=0,
            stop=["x"], stop_token_ids=[7], ignore_eos=True, logprobs=0, logit_bias={2: 1.5},
            allowed_token_ids=[1, 2],
        ),
        priority=-3,
        timeout=Duration(seconds=1, nanos=500_000_000),
    )  # fmt: skip
    call = decoder.generation(request)
    assert call.request_id == "mine"
    assert call.engine_request.params == SamplingParams(
        max_tokens=5, min_tokens=1, temperature=0, top_k=4, top_p=0.5, min_p=0.25,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, seed=0,
        stop=("x",), stop_token_ids=(7,), ignore_eos=True, logprobs=0, logit_bias={2: 1.5},
        allowed_token_ids=(1, 2),
    )  # fmt: skip
    assert (call.engine_request.priority, call.engine_request.timeout) == (-3, 1.5)


@pytest.mark.parametrize("reason", FinishReason)
def test_every_ending_has_its_name_on_the_wire(reason: FinishReason) -> None:
    finish = Finish(reason, None, Usage(1, 2, 3), Timings(0.5, 0.25, 0.75, 2.0))
    message = codec.finished(finish)
    assert pb.FinishReason.Name(message.reason) == f"FINISH_REASON_{reason.name}"
    assert (message.usage.prompt_tokens, message.usage.completion_tokens) == (1, 2)
    assert message.usage.cached_tokens == 3
    assert message.timings.queue.ToMilliseconds() == 500
    assert message.timings.prefill.ToMilliseconds() == 250
    assert message.timings.first_token.ToMilliseconds() == 750
    assert message.timings.total.ToMilliseconds() == 2000
    assert not message.HasField("matched_stop")
    assert not message.HasField("matched_stop_token_id")
