"""The committed generated code is what the .proto files generate, and the contract's names are."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from models.positions import RopeScaling
from models.scoring import Scoring
from protos.headroom.v1 import attention_pb2, models_pb2, tensor_pb2
from protos.headroom.v1 import generation_pb2 as pb
from service.tensors import ELEMENT_TYPES

ROOT = Path(__file__).parent.parent


def test_generated_code_has_not_drifted(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "protos/headroom/v1").glob("*.proto"))
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *protos], cwd=ROOT, check=True
    )
    fresh = {p.name: p.read_text() for p in (tmp_path / "protos/headroom/v1").iterdir()}
    committed = {p.name: p.read_text() for p in (ROOT / "protos/headroom/v1").glob("*_pb2*.py*")}
    assert fresh == committed, "run `make proto`"


def test_complete_request_has_the_fields_of_generate_request() -> None:
    complete, generate = (
        {field.name: (field.number, field.type) for field in message.DESCRIPTOR.fields}
        for message in (pb.CompleteRequest, pb.GenerateRequest)
    )
    assert complete == generate


def test_every_sampling_scalar_tells_unset_from_zero() -> None:
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if not field.is_repeated:
            assert field.has_presence, field.name


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (pb.GenerateRequest, "request_id text token_ids sampling priority timeout"),
        (
            pb.SamplingParams,
            "max_tokens min_tokens temperature top_k top_p min_p repetition_penalty "
            "presence_penalty frequency_penalty seed stop stop_token_ids ignore_eos logprobs "
            "logit_bias allowed_token_ids",
        ),
        (pb.GenerateResponse, "delta finished"),
        (pb.TokenDelta, "token_ids text logprobs"),
        (pb.Finished, "reason matched_stop usage timings"),
        (pb.Usage, "prompt_tokens completion_tokens cached_tokens"),
        (pb.Timings, "queue prefill first_token total"),
        (pb.CompleteResponse, "token_ids text finished"),
        (pb.ScoreRequest, "text token_ids"),
        (pb.ScoreResponse, "token_ids logprobs total_logprob num_bytes"),
        (
            models_pb2.GetLoadResponse,
            "num_running num_waiting kv_blocks_total kv_blocks_used kv_blocks_cached",
        ),
        (
            models_pb2.GetModelResponse,
            "name family num_layers layers vocab_size max_model_len dtype device "
            "kv_bytes_per_token backend",
        ),
        (models_pb2.LayerHeads, "num_heads num_kv_heads head_dim window"),
        (tensor_pb2.Tensor, "dtype shape data"),
        (pb.EmbedRequest, "text token_ids request_id priority timeout pooling normalize"),
        (pb.EmbedResponse, "embedding token_ids usage"),
        (attention_pb2.AttendRequest, "qkv hidden implementation variant"),
        (attention_pb2.AttendResponse, "output weights lse head_outputs backend"),
    ],
)
def test_names_that_clients_rely_on_exist(message: type, names: str) -> None:
    assert set(names.split()) <= set(message.DESCRIPTOR.fields_by_name)  # type: ignore[attr-defined]


def test_every_variant_of_the_models_can_be_asked_for() -> None:
    """A field of `Scoring` or a form of rotary scaling that the wire lacks would be missed."""
    on_wire = {field.name for field in attention_pb2.Variant.DESCRIPTOR.fields}
    renamed = {"causal": "mask"}
    said = {renamed.get(f.name, f.name) for f in dataclasses.fields(Scoring) if f.init}
    assert said <= on_wire
    scalings = attention_pb2.Rope.DESCRIPTOR.oneofs_by_name["scaling"].fields
    names = {field.message_type.name for field in scalings if field.message_type}
    assert names == {kind.__name__ for kind in get_args(RopeScaling)}


def test_every_data_type_has_a_storage() -> None:
    assert set(ELEMENT_TYPES) == set(tensor_pb2.DataType.values()) - {0}
