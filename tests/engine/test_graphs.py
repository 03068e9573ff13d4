"""An engine that replays recorded steps one ahead says what one that waits for each step says.

A tape stands for CUDA graphs, and Triton's interpreter for a GPU, which makes each step slow.
"""

import importlib.util
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.config import HeadConfig
from models.gpu.decode_graphs import Decode, Decoded, DecodeGraphs
from models.kernels import KernelName
from models.sampler import Choice
from models.transformer import Transformer, random_model
from service.engine.config import EngineConfig
from service.engine.engine import Engine, EngineRequest
from service.engine.sampling_params import SamplingParams
from service.engine.sequence import FinishReason, SequenceOutput
from service.engine.stats import StepStats
from tests.engine.tiny import CONFIG, ROPE, finish_all, greedy, reason
from tests.models.tape import tape

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
LIMITS = EngineConfig(
    num_blocks=6, block_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=24
)
BROKEN = 200


def broken_model(kernel: KernelName) -> Transformer:
    """Whatever reads the embedding of one token is not a number."""
    model = random_model(
        CONFIG.replace(layers=(HeadConfig(2, 1, 8, rope=ROPE),)), seed=1, kernel=kernel
    )
    with torch.no_grad():
        model.embed_tokens.weight[BROKEN] = torch.nan
    return model


@pytest.fixture(scope="module")
def recorded() -> Engine:
    return Engine(broken_model("paged_triton"), LIMITS, capture=tape)


@pytest.fixture(scope="module")
def waiting() -> Engine:
    return Engine(broken_model("reference"), LIMITS)


def run(engine: Engine, requests: list[EngineRequest]) -> list[tuple[Any, ...]]:
    outputs = finish_all(engine, requests)
    assert engine.load.kv_blocks_used == 0
    return [(reason(output), output.token_ids) for output in outputs]


def test_the_tokens_are_those_of_an_engine_that_waits(
    recorded: Engine, waiting: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws, edits, log-probabilities, prompts in pieces, preemption, ends that are not foreseen,
    what is not finite."""
    second = run(waiting, [EngineRequest([1, 2, 3], greedy(3))])[0][1][1]
    requests = [
        EngineRequest([1, 2, 3], greedy(8, stop_token_ids=(second,))),
        EngineRequest([4, 5], SamplingParams(max_tokens=4, seed=3, top_k=20, ignore_eos=True)),
        EngineRequest(
            [6] * 10, SamplingParams(max_tokens=4, seed=4, min_tokens=3, stop_token_ids=(7,))
        ),
        EngineRequest([7, 8, 9], greedy(3, repetition_penalty=1.3, logit_bias={5: 2.0})),
        EngineRequest([10], greedy(4, logit_bias={BROKEN: 100.0})),
        EngineRequest([11] * 3, greedy(11)),
        EngineRequest([12] * 3, greedy(11)),
        EngineRequest([13, 14], None),
    ]
    steps: list[StepStats] = []
    monkeypatch.setattr(recorded, "on_step", steps.append)
    found = run(recorded, requests)
    assert found == run(waiting, requests)
    assert sum(step.num_preempted for step in steps) > 0
    assert found[0][0] is FinishReason.STOP
    assert found[4] == (FinishReason.ERROR, (BROKEN,))


def test_log_probabilities_are_reported_too(recorded: Engine, waiting: Engine) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.8, seed=1, logprobs=2, ignore_eos=True)
    found, expected = (
        finish_all(engine, [EngineRequest([1, 2], params)])[0] for engine in (recorded, waiting)
    )
    assert found.token_ids == expected.token_ids
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_the_next_step_is_launched_before_tokens_are_waited_for(
    recorded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    launch, read = DecodeGraphs.run, Choice.read

    def launched(
        self: DecodeGraphs, decodes: list[Decode], before: torch.Tensor | None = None
    ) -> Decoded:
        events.append("first" if before is None else "next")
        return launch(self, decodes, before)

    def waited(self: Choice) -> Any:
        events.append("wait")
        return read(self)

    monkeypatch.setattr(DecodeGraphs, "run", launched)
    monkeypatch.setattr(Choice, "read", waited)
    steps: list[StepStats] = []
    monkeypatch.setattr(recorded, "on_step", steps.append)
    run(recorded, [EngineRequest([1, 2], greedy(4))])
    assert events == ["next", "wait", "next", "wait", "next", "wait", "wait"]
    assert [step.num_tokens for step in steps] == [2, 1, 1, 1]
    events.clear()
    run(recorded, [EngineRequest([1], greedy(2, presence_penalty=0.5))])
    assert events == ["first", "wait", "first", "wait"]


def test_an_abort_and_a_deadline_find_a_step_running(recorded: Engine, waiting: Engine) -> None:
    expected = run(waiting, [EngineRequest([3], greedy(4))])[0][1]
    gone = recorded.add(EngineRequest([1, 2], greedy(20)))
    stays = recorded.add(EngineRequest([3], greedy(4)))
    tokens: list[int] = []
    outputs: list[SequenceOutput] = recorded.step()
    output = recorded.abort(gone)
    assert output is not None
    assert reason(output) is FinishReason.CANCELLED
    late = recorded.add(EngineRequest([5] * 6, greedy(9), timeout=0.0))
    ends: dict[int, FinishReason] = {}
    while True:
        for output in outputs:
            if output.seq_id == stays:
                tokens.extend(output.token_ids)
            if output.finish is not None:
                ends[output.seq_id] = reason(output)
        recorded.scheduler.check_integrity()
        if not recorded.has_unfinished:
            break
        outputs = recorded.step()
    assert ends == {late: FinishReason.DEADLINE, stays: FinishReason.LENGTH}
    assert tuple(tokens) == expected


def test_an_engine_says_whether_it_records(
    recorded: Engine, waiting: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    assert recorded.backend == "paged_triton (graphs)"
    assert waiting.backend == "reference"
    model: Transformer = recorded.model_runner.model
    off = Engine(model, replace(LIMITS, cuda_graphs=False), capture=tape)
    assert off.backend == "paged_triton"
    with caplog.at_level(logging.WARNING):
        other = Engine(broken_model("reference"), LIMITS, capture=tape)
    assert other.backend == "reference"
    assert "decode steps are not recorded: attention is computed by reference" in caplog.text
