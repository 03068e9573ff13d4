"""However the tokens of a sequence are cut into steps, the logits are the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import sampler
from models.config import HeadConfig, ModelConfig
from models.kernels import KernelName
from models.positions import RopeConfig
from models.transformer import Transformer, random_model
from tests.models import numpy_oracle, tiny
from tests.models.kernels import KERNELS

ROPE = RopeConfig(10_000.0, 8)
CONFIGS: dict[str, ModelConfig] = {
    "rope-mha": tiny.llama(layers=(HeadConfig(4, 4, 8, rope=ROPE),) * 2),
    "rope-gqa": tiny.llama(),
    "rope-mqa-tied": tiny.llama(
        layers=(HeadConfig(4, 1, 8, rope=ROPE),) * 2, tie_word_embeddings=True
    ),
    "learned": tiny.gpt2(),
}


def tokens_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny.model(CONFIGS[request.param])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_one_shot_equals_chunked_equals_token_by_token(
    name: str, kernel: KernelName, block_size: int
) -> None:
    model = tiny.model(CONFIGS[name], kernel=kernel)
    tokens = tokens_of(21)
    expected = model.logits(tokens[None])[0]
    assert expected.std() > 0.1, "logits that vanish prove nothing"
    for steps in ([[21]], [[8], [8], [5]], [[1]] * 21, [[4], [1], [7], [1], [1], [7]]):
        (logits,) = tiny.paged_logits(model, [tokens], steps, block_size=block_size)
        assert (logits - expected).abs().max() <= 1e-5


@settings(max_examples=60)
@given(data=st.data())
def test_sequences_of_a_mixed_batch_do_not_know_each_other(data: st.DataObject) -> None:
    model = tiny.model(CONFIGS["rope-gqa"])
    lengths = data.draw(st.lists(st.integers(1, 18), min_size=1, max_size=4))
    left = list(lengths)
    steps: list[list[int]] = []
    while any(left):
        # At least one token each, so that the schedule ends; some wait for the first three steps.
        low = 0 if len(steps) < 3 else 1
        counts = [data.draw(st.integers(min(low, rest), rest)) for rest in left]
        if any(counts):
            steps.append(counts)
            left = [rest - count for rest, count in zip(left, counts, strict=True)]
        else:
            steps.append(left)
            left = [0] * len(left)
    sequences = [tokens_of(length, seed=i) for i, length in enumerate(lengths)]
    for tokens, logits in zip(
        sequences, tiny.paged_logits(model, sequences, steps, block_size=3), strict=True
    ):
        assert (logits - model.logits(tokens[None])[0]).abs().max() <= 1e-5


def test_rows_of_a_dense_batch_do_not_know_each_other(model: Transformer) -> None:
    batch = torch.stack([tokens_of(9, seed) for seed in range(3)])
    together = model.logits(batch)
    assert together.shape == (3, 9, 61)
    for row, tokens in zip(together, batch, strict=True):
        assert (row - model.logits(tokens[None])[0]).abs().max() <= 1e-5


def test_a_token_changes_nothing_before_it_and_something_after(model: Transformer) -> None:
    tokens = tokens_of(9)
    other = tokens.clone()
    other[5] = (other[5] + 1) % 61
    before, after = model.logits(tokens[None])[0], model.logits(other[None])[0]
    assert (before[:5] - after[:5]).abs().max() <= 1e-6
    assert ((before[5:] - after[5:]).abs().amax(dim=-1) > 1e-3).all()


def test_the_order_of_earlier_tokens_matters(model: Transformer) -> None:
    tokens = torch.arange(9)
    swapped = tokens[[0, 4, 2, 3, 1, 5, 6, 7, 8]]
    difference = model.logits(tokens[None])[0, -1] - model.logits(swapped[None])[0, -1]
    assert difference.abs().max() > 1e-3


def test_tied_models_have_no_own_head() -> None:
    tied = tiny.model(tiny.llama(tie_word_embeddings=True))
    untied = tiny.model(tiny.llama())
    assert tied.lm_head is None
    assert untied.num_parameters - tied.num_parameters == 61 * 24
    hidden = torch.randn(3, 24)
    assert torch.allclose(tied.project_to_vocab(hidden), hidden @ tied.embed_tokens.weight.T)
    assert untied.lm_head is not None
    assert torch.allclose(untied.project_to_vocab(hidden), hidden @ untied.lm_head.weight.T)


def test_logits_are_scaled_then_capped() -> None:
    plain = tiny.model(tiny.llama())
    capped = tiny.model(tiny.llama(logit_scale=1.7, logit_softcap=2.0))
    tokens = tokens_of(5)[None]
    expected = [
        numpy_oracle.softcap(1.7 * logit, 2.0) for logit in plain.logits(tokens).flatten().tolist()
    ]
    difference = capped.logits(tokens).flatten() - torch.tensor(expected)
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [
    tiny.llama(), tiny.llama(tie_word_embeddings=True), tiny.llama(logit_scale=-1.7),
    tiny.llama(logit_softcap=0.01),
])  # fmt: skip
@torch.inference_mode()
def test_the_most_likely_token_is_that_of_the_logits(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    built = tiny.model(config, dtype=dtype)
    hidden = torch.randn(7, 24, dtype=dtype)
    hidden[2, 5] = torch.nan
    expected = sampler.most_likely(built.project_to_vocab(hidden))
    assert torch.equal(built.most_likely(hidden), expected)
    assert expected[2] == sampler.NOTHING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_float32_for_half_precision_models(name: str, dtype: torch.dtype) -> None:
    exact, half = tiny.model(CONFIGS[name]), tiny.model(CONFIGS[name], dtype=dtype)
    tokens = tokens_of(12)
    logits = half.logits(tokens[None])[0]
    assert half.dtype == dtype
    assert logits.dtype == torch.float32
    (paged,) = tiny.paged_logits(half, [tokens], [[7], [1], [4]])
    assert paged.dtype == torch.float32
    spread = exact.logits(tokens[None]).std()
    assert (logits - exact.logits(tokens[None])[0]).abs().mean() < 0.1 * spread
    assert (logits - paged).abs().mean() < 0.1 * spread


def test_a_model_that_changed_its_type_rotates_in_the_new_one() -> None:
    model = tiny.model(CONFIGS["rope-gqa"])
    tokens = tokens_of(12)
    single = model.logits(tokens[None])
    double = model.double().logits(tokens[None])
    assert model.rotation(ROPE, torch.arange(3))[0].dtype == torch.float64
    assert (single - double).abs().max() <= 1e-5


def test_random_models_are_made_by_their_seed() -> None:
    first, again, other = (random_model(tiny.gpt2(), seed=seed) for seed in (3, 3, 4))
    same = first.state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in again.state_dict().items())
    different = {
        name for name, tensor in other.state_dict().items() if not torch.equal(same[name], tensor)
    }
    assert different == {name for name, tensor in same.items() if tensor.ndim == 2}


def test_random_models_do_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = random_model(tiny.llama(), seed=0).embed_tokens.weight
    torch.manual_seed(2)
    assert torch.equal(first, random_model(tiny.llama(), seed=0).embed_tokens.weight)


def test_random_models_start_at_the_documented_spread() -> None:
    config = tiny.llama(vocab_size=2000, hidden_size=128, intermediate_size=512)
    model = random_model(config, seed=0)
    expected = {
        "embed_tokens.weight": 128**-0.5,
        "layers.0.attention.qkv.weight": 128**-0.5,
        "layers.1.attention.output.weight": 32**-0.5 / 2,  # √(2 · 2 layers)
        "layers.1.mlp.up.weight": 128**-0.5,
        "layers.0.mlp.down.weight": 512**-0.5 / 2,
    }
    parameters = model.state_dict()
    for name, std in expected.items():
        assert float(parameters[name].std()) == pytest.approx(std, rel=0.05)
    assert (parameters["final_norm.weight"] == 1).all()


def test_random_models_can_be_made_in_another_type() -> None:
    model = random_model(tiny.llama(), seed=0, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    exact = random_model(tiny.llama(), seed=0).embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight, exact.bfloat16())
