"""One model, many ways through it: all give the same logits and the same greedy tokens.

The oracle is the model without a cache, which other tests compare with the formulas. The ways:
in chunks, token by token, mixed with other sequences, preempted and computed again, continued
from a cached prefix; for everything that a head configuration can say, in every kernel.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from models.config import HeadConfig, ModelConfig, QKNorm
from models.kernels import KernelName
from models.kv_layout import KVLayout
from models.positions import (
    Alibi,
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
    alibi_slopes,
    mpt_alibi_slopes,
)
from models.transformer import Transformer
from service.engine.block_manager import BlockManager
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.errors import NeverFitsError
from service.engine.memory import block_groups
from service.engine.sequence import SequenceOutput
from service.engine.stats import StepStats
from tests.engine.tiny import finish_all, greedy
from tests.models import tiny
from tests.models.kernels import KERNELS, NAMES, marks

ROPE = RopeConfig(10_000.0, 8)
PLAIN = HeadConfig(4, 2, 8, rope=ROPE)
BLOCK_SIZE = 4


def heads(**changes: object) -> tuple[HeadConfig, ...]:
    """Two equal layers."""
    return (replace(PLAIN, **changes),) * 2  # type: ignore[arg-type]


def scaled(scaling: RopeScaling) -> tuple[HeadConfig, ...]:
    return heads(rope=RopeConfig(10_000.0, 8, scaling=scaling))


LAYERS: dict[str, tuple[HeadConfig, ...]] = {
    "plain": heads(),
    "multi-query": heads(num_kv_heads=1),
    "no-positions": heads(rope=None),
    "scale": heads(scale=0.9),
    "short-window": heads(window=5),
    "window-of-one": heads(window=1),
    "long-window": heads(window=200),
    "window-and-sink-tokens": heads(window=6, sink_tokens=5),
    "alternating-windows": (
        replace(PLAIN, window=5),
        PLAIN,
        replace(PLAIN, window=5, sink_tokens=2),
    ),
    "window-each-head": (
        replace(PLAIN, window=(3, 5, None, None), sink_tokens=3),
        HeadConfig(6, 3, 4, window=(None, 7, 3, 3, 9, None)),
    ),
    # Widths that do not divide each other, in blocks that do not divide a page.
    "different-layers": (
        HeadConfig(4, 2, 24, window=(3, 5, None, None)),
        HeadConfig(6, 3, 16, window=(None, 7, 3, 3, 9, None), rope=RopeConfig(10_000.0, 16)),
        HeadConfig(5, 5, 8, rope=ROPE),
    ),
    "learned-sinks": heads(learned_sinks=True),
    "learned-sinks-and-window": heads(learned_sinks=True, window=6),
    "softcap": heads(softcap=1.5, scale=0.9),
    "softcap-sinks-and-window": heads(num_kv_heads=1, softcap=2.0, learned_sinks=True, window=6),
    "alibi-bloom": heads(rope=None, alibi=Alibi(alibi_slopes(4))),
    "alibi-mpt": heads(rope=None, alibi=Alibi(mpt_alibi_slopes(4, 16)), clip_qkv=0.7),
    "alibi-falcon": heads(rope=None, alibi=Alibi(alibi_slopes(4), True, True)),
    "alibi-and-window": heads(rope=None, alibi=Alibi(alibi_slopes(4)), window=7),
    "temperature": heads(temperature=(0.5, 1.0, 2.0, 3.0)),
    "clip-qkv": heads(clip_qkv=0.5),
    "qk-norm-of-a-head": heads(qk_norm=QKNorm("rms_norm", "head", 1e-5)),
    "qk-norm-with-offset": heads(qk_norm=QKNorm("rms_norm", "head", 1e-5, unit_offset=True)),
    "qk-norm-of-each-head": heads(qk_norm=QKNorm("layer_norm", "each_head", 1e-5)),
    "qk-norm-of-all-heads": heads(qk_norm=QKNorm("rms_norm", "all_heads", 1e-5)),
    "rope-partial": heads(rope=RopeConfig(10_000.0, 4)),
    "rope-interleaved": heads(rope=RopeConfig(10_000.0, 8, interleaved=True)),
    "rope-two-bases": (PLAIN, replace(PLAIN, rope=RopeConfig(100.0, 8), window=9)),
    "rope-linear": scaled(LinearScaling(3.0)),
    "rope-yarn": scaled(YarnScaling(4.0, 16, 1.2)),
    "rope-llama3": scaled(Llama3Scaling(8.0, 1.0, 4.0, 16)),
    "rope-dynamic": scaled(DynamicNtkScaling(4.0, 8)),
    "rope-long": scaled(LongRopeScaling((1.0,) * 4, (2.0, 3.0, 4.0, 5.0), 16, 1.2)),
}
MODELS: dict[str, dict[str, object]] = {
    "learned-positions": {
        "layers": heads(rope=None),
        "learned_positions": 66,
        "position_offset": 2,
        "embedding_size": 10,
        "norm": "layer_norm",
    },
    "parallel": {"parallel": True},
    "parallel-with-one-norm": {"parallel": True, "shared_norm": True},
    "sandwich-norm": {
        "residual": "sandwich_norm",
        "norm_unit_offset": True,
        "embedding_scale": 1.7,
        "logit_softcap": 2.0,
    },
    "output-norm": {"residual": "output_norm"},
    "post-norm": {"residual": "post_norm", "embedding_norm": True, "final_norm": False},
    "scaled-residual": {"residual_scale": 0.6, "logit_scale": 0.5},
    "experts": {"num_experts": 4, "num_experts_per_token": 2, "swiglu_limit": 1.5},
}
CONFIGS: dict[str, ModelConfig] = {
    **{name: tiny.llama(layers=layers) for name, layers in LAYERS.items()},
    **{name: tiny.llama(**changes) for name, changes in MODELS.items()},
}
EVERY_PATH = [
    pytest.param(name, kernel, id=f"{name}-{kernel}", marks=marks(kernel))
    for name in CONFIGS
    for kernel in NAMES
    if (name, kernel) != ("alibi-falcon", "paged_cpu")  # which does not round biases
]
# Of three sequences of 23, 1 and 40 tokens.
SCHEDULES = {
    "one-shot": [[23, 1, 40]],
    "chunks": [[9, 1, 30], [1, 0, 1], [4, 0, 8], [9, 0, 1]],
    "token-by-token": [[1, 1, 1], *[[1, 0, 1]] * 22, *[[0, 0, 1]] * 17],
}


@cache
def model_of(
    name: str, kernel: KernelName = "auto", dtype: torch.dtype = torch.float32
) -> Transformer:
    return tiny.model(CONFIGS[name], kernel=kernel, dtype=dtype)


def tokens_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed))


# Without the engine


@pytest.mark.parametrize(("name", "kernel"), EVERY_PATH)
def test_however_tokens_are_cut_into_steps_the_logits_are_the_same(
    name: str, kernel: KernelName
) -> None:
    sequences = [tokens_of(length, length) for length in (23, 1, 40)]
    for dtype, bar in ((torch.float32, 1e-5), (torch.float64, 1e-6)):  # logits are float32
        if (kernel, dtype) == ("paged_cpu", torch.float64):
            continue
        model = model_of(name, kernel, dtype)
        expected = [model.logits(tokens[None])[0] for tokens in sequences]
        assert expected[0].std() > 0.1, "logits that vanish prove nothing"
        for schedule in SCHEDULES.values():
            paged = tiny.paged_logits(model, sequences, schedule)
            for ours, theirs in zip(paged, expected, strict=True):
                assert (ours - theirs).abs().max() <= bar


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name not in ("plain", "long-window", "multi-query")]
)
def test_every_setting_matters(name: str) -> None:
    """The same weights without it give other logits, so that ignoring it is seen."""
    config, model = CONFIGS[name], model_of(name)
    if name in ("learned-sinks-and-window", "softcap-sinks-and-window"):
        stripped = tuple(replace(layer, window=None) for layer in config.layers)
    else:
        stripped = tuple(
            HeadConfig(
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                rope=RopeConfig(10_000.0, layer.head_dim),
            )
            for layer in config.layers
        )
    other = tiny.model(config.replace(layers=stripped))
    other.load_state_dict(model.state_dict(), strict=False)
    tokens = tokens_of(40)[None]
    assert (model.logits(tokens) - other.logits(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("window", [None, 5, (3, 5, None, 200)], ids=["all", "window", "each"])
def test_an_encoder_is_the_same_with_a_cache_in_one_shot(
    kernel: KernelName, window: int | tuple[int | None, ...] | None
) -> None:
    """Its tokens see later ones, so it cannot be cut into steps."""
    config = tiny.llama(layers=heads(causal=False, window=window))
    model = tiny.model(config, kernel=kernel)
    sequences = [tokens_of(length, length) for length in (23, 1, 40)]
    paged = tiny.paged_hidden(model, sequences, [[23, 1, 40]])
    for ours, tokens in zip(paged, sequences, strict=True):
        assert (ours - model.forward_dense(tokens[None])[0]).abs().max() <= 1e-5
    changed = sequences[0].clone()
    changed[-1] = (changed[-1] + 1) % 61
    moved = model.forward_dense(changed[None])[0, -2] - paged[0][-2]
    assert moved.abs().max() > 1e-3, "a later token is seen"


# Through the engine

# A window of one needs no past: its sequences take one block each, and are never in the way.
SERVED = [path for path in EVERY_PATH if path.values[0] != "window-of-one"]


def small_pool(config: ModelConfig, longest: int, max_new_tokens: int) -> int:
    """The fewest pages that hold one sequence."""
    manager = BlockManager(
        0, BLOCK_SIZE, enable_prefix_caching=False, groups=block_groups(config, BLOCK_SIZE)
    )
    return manager.pages_for(longest, max_new_tokens)


def check_outputs(
    model: Transformer, prompts: list[list[int]], outputs: list[SequenceOutput]
) -> None:
    """Every token is the best one after those before it, with the logarithm of its probability."""
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = torch.tensor([*prompt, *output.token_ids])
        logits = next_logits(model, whole, len(prompt))
        assert list(output.token_ids) == logits.argmax(dim=-1).tolist()
        expected = logits.log_softmax(dim=-1).amax(dim=-1)
        ours = torch.tensor([token.logprob for token in output.logprobs])
        assert (ours - expected).abs().max() <= 1e-5


def next_logits(model: Transformer, tokens: Tensor, num_prompt: int) -> Tensor:
    """Logits after the prompt and after each generated token but the last."""
    rows = slice(num_prompt - 1, len(tokens) - 1)
    if model.config.rope_switch_length is not None:
        # What was computed before the switch is computed again after it.
        ends = range(num_prompt, len(tokens))
        return torch.stack([model.logits(tokens[None, :end])[0, -1] for end in ends])
    if model.config.rope_depends_on_length:
        # A key stays as it was rotated when its token came.
        (logits,) = tiny.paged_logits(model, [tokens], [[len(tokens)]], prompt_lengths=[num_prompt])
        return logits[rows]
    return model.logits(tokens[None])[0, rows]


@pytest.mark.parametrize(("name", "kernel"), SERVED)
def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    name: str, kernel: KernelName
) -> None:
    model = model_of(name, kernel)
    prompts = [tokens_of(length, length).tolist() for length in (3, 1, 2, 9)]
    steps: list[StepStats] = []
    engine = Engine(
        model,
        EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=small_pool(model.config, 9 + 30, 4),
            max_num_seqs=4,
            max_num_batched_tokens=4,
        ),
        on_step=steps.append,
    )
    params = greedy(30, logprobs=0)
    outputs = finish_all(engine, [EngineRequest(prompt, params) for prompt in prompts])
    assert sum(step.num_preempted for step in steps) > 0
    assert max(step.num_sequences for step in steps) > 1
    assert engine.load.kv_blocks_used == 0
    check_outputs(model, prompts, outputs)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [path for path in SERVED if not CONFIGS[str(path.values[0])].rope_depends_on_length],
)
def test_a_cached_prefix_is_as_good_as_a_computed_one(name: str, kernel: KernelName) -> None:
    model = model_of(name, kernel)
    beginning = tokens_of(21).tolist()
    prompts = [beginning, [*beginning, 1, 2, 3], [*beginning[:17], 5]]
    engine = Engine(
        model,
        EngineConfig(block_size=BLOCK_SIZE, num_blocks=200, enable_prefix_caching=True),
    )
    params = greedy(12, logprobs=0)
    outputs = [
        output
        for prompt in prompts
        for output in finish_all(engine, [EngineRequest(prompt, params)])
    ]
    cached = [output.finish.usage.cached_tokens for output in outputs if output.finish]
    assert cached == [0, 20, 16]
    check_outputs(model, prompts, outputs)


@pytest.mark.parametrize("name", ["rope-dynamic", "rope-long"])
def test_no_prefix_is_cached_where_equal_tokens_can_have_different_keys(name: str) -> None:
    config = EngineConfig(block_size=BLOCK_SIZE, num_blocks=200, enable_prefix_caching=True)
    with pytest.raises(ValueError, match="enable_prefix_caching is true; allowed: false"):
        Engine(model_of(name), config)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_sequence_that_outgrows_its_rotation_is_computed_again_once(kernel: KernelName) -> None:
    """After 16 tokens; longer prompts are rotated for long sequences from the beginning."""
    model = model_of("rope-long", kernel)
    steps: list[StepStats] = []
    config = EngineConfig(block_size=BLOCK_SIZE, num_blocks=200, max_num_batched_tokens=64)
    engine = Engine(model, config, on_step=steps.append)
    prompts = [tokens_of(length, length).tolist() for length in (3, 15, 16, 17, 30)]
    outputs = finish_all(engine, [EngineRequest(p, greedy(20, logprobs=0)) for p in prompts])
    check_outputs(model, prompts, outputs)
    once = sum(len(prompt) + 19 for prompt in prompts)
    assert sum(step.num_tokens for step in steps) == once + 3 * 16


# Windows and memory


@cache
def long_model(name: str) -> Transformer:
    """Two layers of the same shape, for up to 400 tokens."""
    layers = {
        "windows": heads(window=9),
        "windows-and-sinks": heads(window=9, sink_tokens=6),
        "alternating": (replace(PLAIN, window=9), PLAIN),
        "half-of-the-heads": heads(window=(9, 9, None, None)),
        "everything": heads(),
    }[name]
    return tiny.model(tiny.llama(layers=layers, max_position_embeddings=400))


def pages_in_use(
    model: Transformer, num_prompt: int, num_generated: int, *, num_pages: int, chunk: int
) -> list[int]:
    """Used pages after each step of one generation, which is checked token by token."""
    used: list[int] = []
    engine = Engine(
        model,
        EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_pages,
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
        ),
        on_step=lambda step: used.append(step.load.kv_blocks_used),
    )
    prompt = tokens_of(num_prompt).tolist()
    params = greedy(num_generated, logprobs=0)
    outputs = finish_all(engine, [EngineRequest(prompt, params)])
    check_outputs(model, [prompt], outputs)
    assert len(outputs[0].token_ids) == num_generated
    return used


@pytest.mark.parametrize("chunk", [1, 5, 8])
@pytest.mark.parametrize(("name", "num_sink_blocks"), [("windows", 0), ("windows-and-sinks", 2)])
def test_a_sequence_of_windows_never_holds_more_than_they_see(
    name: str, num_sink_blocks: int, chunk: int
) -> None:
    """47 tokens in chunks, then 300 more, in a pool of a few blocks."""
    model = long_model(name)
    most = -(-(9 - 1 + chunk - 1) // BLOCK_SIZE) + 1 + num_sink_blocks
    used = pages_in_use(model, 47, 300, num_pages=most, chunk=chunk)
    assert len(used) == -(-47 // chunk) + 299
    assert max(used) <= most
    # The last step frees all. Nine keys in a row always touch three blocks of four.
    assert {*used[-299:-1]} == {3 + num_sink_blocks}


def test_a_pool_serves_more_tokens_than_it_could_hold_without_windows() -> None:
    """Blocks of both models are equally large, so that pages mean bytes."""
    windows, everything = long_model("windows"), long_model("everything")
    pages_in_use(windows, 47, 300, num_pages=4, chunk=5)
    with pytest.raises(NeverFitsError, match=r"need 346 tokens .* has 16 in total"):
        pages_in_use(everything, 47, 300, num_pages=4, chunk=5)


@pytest.mark.parametrize("name", ["alternating", "half-of-the-heads"])
def test_windows_in_half_of_the_cache_save_nearly_half_of_it(name: str) -> None:
    """Bytes that 347 tokens take in the end: 87 blocks of one kind, and few of the other."""
    block_bytes = 2 * 2 * 8 * BLOCK_SIZE * 4  # keys and values of a layer's two heads, float32
    peak: dict[str, int] = {}
    for each in (name, "everything"):
        layout = KVLayout.of(long_model(each).config, BLOCK_SIZE)
        used = pages_in_use(long_model(each), 48, 300, num_pages=200, chunk=8)
        peak[each] = max(used) * layout.page_elements * 4
    assert peak["everything"] == 2 * 87 * block_bytes
    assert 87 * block_bytes < peak[name] <= (87 + 4) * block_bytes


def test_a_pool_of_mixed_windows_serves_many_at_once_and_is_whole_again() -> None:
    """Long and short, in a pool that cannot hold them all: pages change between the groups."""
    model = long_model("alternating")
    steps: list[StepStats] = []
    engine = Engine(
        model,
        EngineConfig(
            block_size=BLOCK_SIZE, num_blocks=40, max_num_seqs=6, max_num_batched_tokens=16
        ),
        on_step=steps.append,
    )
    prompts = [tokens_of(length, length).tolist() for length in (40, 3, 17, 25, 1, 8, 60, 12)]
    outputs = finish_all(engine, [EngineRequest(p, greedy(50, logprobs=0)) for p in prompts])
    check_outputs(model, prompts, outputs)
    assert sum(step.num_preempted for step in steps) > 0
    assert max(step.load.kv_blocks_used for step in steps) == 40
    assert engine.load.kv_blocks_used == 0
