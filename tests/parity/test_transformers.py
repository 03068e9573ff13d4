"""The oracle is transformers itself, in eager float32, on models with every parameter random."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from models import load_model
from service.engine import Engine, EngineConfig, SamplingParams
from tests import checkpoints

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-mha": lambda: checkpoints.llama(num_kv_heads=4),
    "llama-gqa": lambda: checkpoints.llama(num_kv_heads=2),
    "llama-mqa": lambda: checkpoints.llama(num_kv_heads=1),
    "llama-bias-wide-heads": lambda: checkpoints.llama(
        attention_bias=True, mlp_bias=True, head_dim=24
    ),
    "llama-tied": lambda: checkpoints.llama(tie_word_embeddings=True),
    "llama-theta": lambda: checkpoints.llama(
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    ),
    "gpt2": checkpoints.gpt2,
    "gpt2-inverse-layer-scale": lambda: checkpoints.gpt2(scale_attn_by_inverse_layer_idx=True),
    "gpt2-wide-mlp": lambda: checkpoints.gpt2(n_inner=80, activation_function="relu"),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Path]:
    """A model of transformers, and the directory it was saved to."""
    theirs = MODELS[request.param]()
    return theirs, checkpoints.save(theirs, tmp_path_factory.mktemp(request.param))


def test_logits_equal(pair: tuple[PreTrainedModel, Path]) -> None:
    theirs, path = pair
    ours = load_model(path)
    for num_tokens in (1, 3, 17, 40):
        input_ids = torch.randint(0, checkpoints.VOCAB_SIZE, (2, num_tokens))
        with torch.inference_mode():
            expected = theirs(input_ids).logits
        difference = (ours.logits(input_ids) - expected).abs().max()
        assert difference <= 1e-5, f"{num_tokens} tokens: {difference}"
        assert expected.std() > 0.1, "logits that all agree prove nothing"


def test_greedy_tokens_equal(pair: tuple[PreTrainedModel, Path]) -> None:
    theirs, path = pair
    prompts = [
        torch.randint(0, checkpoints.VOCAB_SIZE, (length,)).tolist() for length in (1, 5, 16, 33)
    ]
    engine = Engine.from_checkpoint(path, EngineConfig(max_num_batched_tokens=64))
    outputs = engine.generate(
        prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, min_new_tokens=20,
            pad_token_id=0,
        )  # fmt: skip
        assert output.token_ids == expected[0, len(prompt) :].tolist()
    distinct = {token_id for output in outputs for token_id in output.token_ids}
    assert len(distinct) > 3, "constant outputs prove nothing"


def test_bfloat16_error_is_at_most_twice_theirs(pair: tuple[PreTrainedModel, Path]) -> None:
    theirs, path = pair
    input_ids = torch.randint(0, checkpoints.VOCAB_SIZE, (1, 40))
    with torch.inference_mode():
        exact = theirs(input_ids).logits
        rounded = copy.deepcopy(theirs).to(torch.bfloat16)(input_ids).logits.float()
    our_error = (load_model(path, dtype=torch.bfloat16).logits(input_ids) - exact).abs().max()
    assert our_error <= 2 * (rounded - exact).abs().max()
