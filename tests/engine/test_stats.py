"""What listeners are told: every token, prompt, gap and end, once."""

import random
from collections import Counter

import pytest

from models.config import HeadConfig
from models.transformer import random_model
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import Finish, FinishReason
from service.engine.stats import StepStats
from tests.engine.tiny import CONFIG, ROPE, finish_all, greedy, tiny_engine, tiny_model
from tests.fakes import SchedulerLoop


class Listener:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finishes: list[Finish] = []

    def engine(self, config: EngineConfig, *, broken_token: int | None = None) -> Engine:
        return Engine(
            tiny_model(broken_token=broken_token),
            config,
            on_step=self.steps.append,
            on_finish=self.finishes.append,
        )


def _windows(*each: int | None, sink_tokens: int = 0) -> HeadConfig:
    return HeadConfig(4, 4, 8, rope=ROPE, window=each, sink_tokens=sink_tokens)


LAYERS = {
    "all": CONFIG.layers,
    "one window": (_windows(*[6] * 4), _windows(*[6] * 4)),
    "mixed": (_windows(None, 6, 6, 20, sink_tokens=2), HeadConfig(4, 1, 8, rope=ROPE)),
}


def _seen_bytes(layers: tuple[HeadConfig, ...], start: int, end: int) -> int:
    """Counts by looking: each key/value head, each query, each key."""
    num_bytes = 0
    for heads in layers:
        for kv_head in range(heads.num_kv_heads):
            size = heads.num_queries_per_kv
            windows = heads.windows[kv_head * size : (kv_head + 1) * size]
            keys = {
                key
                for window in windows
                for query in range(start, end)
                for key in range(query + 1)
                if window is None or query - key < window or key < heads.sink_tokens
            }
            num_bytes += len(keys) * 2 * heads.head_dim * 4
    return num_bytes


@pytest.mark.parametrize("name", LAYERS)
def test_a_steps_bytes_are_those_its_queries_see(name: str) -> None:
    steps: list[StepStats] = []
    layers = LAYERS[name]
    model = random_model(CONFIG.replace(layers=layers), seed=1)
    config = EngineConfig(
        num_blocks=256, block_size=4, max_num_batched_tokens=16, max_num_seqs=4, num_threads=1
    )
    engine = Engine(model, config, on_step=steps.append)
    engine.add(EngineRequest([1] * 45, greedy(12)))
    computed = 0
    while engine.has_unfinished:
        engine.step()
        end = computed + steps[-1].num_tokens
        assert steps[-1].kv_bytes == _seen_bytes(layers, computed, end)
        if steps[-1].phase == "decode":
            assert steps[-1].kv_bytes == engine.served_config.kv_bytes(end)
        computed = end
    assert [step.phase for step in steps] == ["prefill"] * 3 + ["decode"] * 11


def test_bytes_add_up_over_sequences() -> None:
    steps: list[StepStats] = []
    engine = tiny_engine(on_step=steps.append)
    lengths = [3, 10, 50]
    for length in lengths:
        engine.add(EngineRequest([1] * length, greedy(3)))
    engine.step()
    engine.step()
    assert steps[1].phase == "decode"
    expected = sum(engine.served_config.kv_bytes(length + 1) for length in lengths)
    assert steps[1].kv_bytes == expected


@pytest.mark.parametrize("num_blocks", [24, 256])
@pytest.mark.parametrize("caching", [False, True])
def test_tokens_are_told_once_whatever_is_computed_again(num_blocks: int, caching: bool) -> None:
    listener = Listener()
    engine = listener.engine(
        EngineConfig(
            num_blocks=num_blocks, block_size=4, enable_prefix_caching=caching, num_threads=1
        )
    )
    rng = random.Random(1)
    requests = [
        EngineRequest([n % 7] * rng.randint(1, 30), greedy(rng.randint(1, 20)), request_id=str(n))
        for n in range(20)
    ]
    requests += [EngineRequest([1] * n, None, request_id=f"score {n}") for n in (2, 9, 30)]
    outputs = finish_all(engine, requests)
    assert (sum(step.num_preempted for step in listener.steps) > 0) == (num_blocks == 24)
    prompts = [prompt for step in listener.steps for prompt in step.progress.prompts]
    by_id = {prompt.request_id: prompt for prompt in prompts}
    assert len(prompts) == len(by_id) == len(requests)
    num_gaps = sum(len(step.progress.token_gaps) for step in listener.steps)
    assert num_gaps == sum(max(len(output.token_ids) - 1, 0) for output in outputs)
    ends = {finish.request_id: finish for finish in listener.finishes}
    for request, output in zip(requests, outputs, strict=True):
        assert output.finish is not None
        assert ends[request.request_id] is output.finish
        prompt = by_id[request.request_id]
        usage, timings = output.finish.usage, output.finish.timings
        assert prompt.num_tokens == usage.prompt_tokens == len(request.prompt_token_ids)
        assert prompt.num_cached_tokens == usage.cached_tokens
        assert prompt.first_token == (timings.first_token if request.params else None)
    assert len(listener.finishes) == len(requests)


def test_every_end_is_told_before_the_caller_hears_of_it() -> None:
    listener = Listener()
    config = EngineConfig(num_blocks=256, block_size=4, max_num_seqs=8, num_threads=1)
    engine = listener.engine(config, broken_token=9)
    long = greedy(200)
    endings = {
        "length": EngineRequest([1], greedy(1)),
        "error": EngineRequest([9], long),
        "deadline": EngineRequest([1], long, timeout=1e-9),
        "cancelled": EngineRequest([1], long),
        "drained": EngineRequest([1], long),
        "never ran": EngineRequest([1], long),
    }
    ids = {
        name: engine.add(
            EngineRequest(r.prompt_token_ids, r.params, timeout=r.timeout, request_id=name)
        )
        for name, r in endings.items()
        if name != "never ran"
    }
    for output in engine.step():
        if output.finish is not None:
            assert output.finish in listener.finishes
    assert engine.abort(ids["cancelled"]) is not None
    assert listener.finishes[-1].request_id == "cancelled"
    assert engine.abort(ids["cancelled"]) is None
    engine.add(EngineRequest([1], long, request_id="never ran"))
    engine.scheduler.abort_all(FinishReason.CANCELLED)
    told = {finish.request_id: finish.reason.name for finish in listener.finishes}
    assert told == {
        "length": "LENGTH",
        "error": "ERROR",
        "deadline": "DEADLINE",
        "cancelled": "CANCELLED",
        "drained": "CANCELLED",
        "never ran": "CANCELLED",
    }
    assert len(listener.finishes) == len(endings)
    prompts = [prompt.request_id for step in listener.steps for prompt in step.progress.prompts]
    assert sorted(prompts) == ["cancelled", "drained", "length"]


def test_gaps_are_measured_from_token_to_token() -> None:
    loop = SchedulerLoop()
    loop.add([1, 2, 3], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
    told: list[float] = []
    for seconds in (2.0, 0.5, 3.0, 0.25):
        loop.clock.advance(seconds)
        loop.step()
        progress = loop.scheduler.progress
        told += [prompt.first_token or 0 for prompt in progress.prompts] + progress.token_gaps
    assert told == [2.0, 0.5, 3.0, 0.25]


def test_a_gap_spans_a_preemption() -> None:
    loop = SchedulerLoop(num_blocks=6)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    for _ in range(2):
        loop.add([1] * 6, params)
    gaps: Counter[float] = Counter()
    while loop.scheduler.has_unfinished:
        loop.clock.advance(1.0)
        loop.step()
        gaps.update(loop.scheduler.progress.token_gaps)
    assert loop.num_preempted > 0
    assert gaps.total() == 2 * 9
    assert max(gaps) > 1.0
