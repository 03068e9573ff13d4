"""`batch_invariant`: the same bits alone and among others, or a refusal that says why."""

import random
from typing import Any

import pytest
import torch

from models.errors import ConfigError
from models.linear import Linear
from models.transformer import Transformer
from service.engine.engine import EngineRequest
from tests.engine.tiny import finish_all, greedy, tiny_engine, tiny_model
from tests.models.kernels import needs_library


def bfloat16_model() -> Transformer:
    return tiny_model().to(torch.bfloat16)


@needs_library
@pytest.mark.parametrize(
    "types", [{}, {"weight_dtype": "int8"}, {"kv_cache_dtype": "int8"}], ids=str
)
def test_tokens_and_probabilities_have_the_same_bits_in_any_company(types: dict[str, str]) -> None:
    rng = random.Random(0)
    requests = [
        EngineRequest([rng.randrange(60) for _ in range(length)], greedy(20, logprobs=3))
        for length in (3, 17, 40, 5, 29)
    ]
    limits: dict[str, Any] = {**types, "batch_invariant": True}
    alone = [
        finish_all(tiny_engine(bfloat16_model(), **limits), [request])[0] for request in requests
    ]
    together = finish_all(
        tiny_engine(bfloat16_model(), max_num_batched_tokens=16, max_num_seqs=4, **limits), requests
    )
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


@needs_library
def test_weights_are_packed_even_where_torchs_amx_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = {**torch.cpu.get_capabilities(), "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr("models.cpu.linear.multiplies_by_amx", lambda: False)
    for batch_invariant in (False, True):
        engine = tiny_engine(bfloat16_model(), batch_invariant=batch_invariant)
        linears = [m for m in engine.model_runner.model.modules() if isinstance(m, Linear)]
        assert {linear.is_packed for linear in linears} == {batch_invariant}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny_model().half(), r"multiplies by torch's own operations \(the type is"),
        pytest.param(
            lambda: tiny_model(kernel="dense"),
            "attention is computed by dense",
            marks=needs_library,
        ),
    ],
    ids=["float16", "dense"],
)
def test_what_cannot_be_promised_is_refused(model: object, reason: str) -> None:
    assert callable(model)
    with pytest.raises(ConfigError, match=reason) as caught:
        tiny_engine(model(), batch_invariant=True)
    assert caught.value.field == "batch_invariant"


def test_without_the_library_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.cpu.linear.why_unavailable", lambda: "it was not compiled")
    with pytest.raises(ConfigError, match="it was not compiled"):
        tiny_engine(batch_invariant=True)
