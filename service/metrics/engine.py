"""What one engine has done, from what it tells its listeners."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import get_args

from prometheus_client.metrics_core import Metric

from service.engine.sequence import Finish, FinishReason
from service.engine.stats import Phase, StepStats
from service.metrics.families import counter, histogram
from service.metrics.histogram import SECONDS, SEQUENCES, TOKENS, Histogram

_PHASES: tuple[Phase, ...] = get_args(Phase)
# Steps that are counted at once: right after a step, when the processor's caches hold the model's
# things, counting one takes several times what it takes in a row.
_STEPS_AT_ONCE = 32


class EngineMetrics:
    """Counters and histograms of an engine.

    The engine thread writes, before the caller of a request hears of what is written; any thread
    may read.

    Args:
        prefix_caching: whether the engine looks prompts up in its prefix cache.
    """

    def __init__(self, *, prefix_caching: bool) -> None:
        self._prefix_caching = prefix_caching
        self._uncounted: deque[StepStats] = deque()
        self._counting = threading.Lock()
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._prefix_hits = 0
        self._preemptions = 0
        self._finished = dict.fromkeys(FinishReason, 0)
        self._kv_bytes: dict[Phase, int] = dict.fromkeys(_PHASES, 0)
        self._step_duration = {phase: Histogram(SECONDS) for phase in _PHASES}
        self._batch_size = {phase: Histogram(SEQUENCES) for phase in _PHASES}
        self._first_token = Histogram(SECONDS)
        self._inter_token = Histogram(SECONDS)
        self._per_output_token = Histogram(SECONDS)
        self._e2e = Histogram(SECONDS)
        self._queue = Histogram(SECONDS)
        self._prompt_lengths = Histogram(TOKENS)
        self._generation_lengths = Histogram(TOKENS)

    def on_step(self, stats: StepStats) -> None:
        self._uncounted.append(stats)
        if len(self._uncounted) >= _STEPS_AT_ONCE:
            self._count_steps()

    def _count_steps(self) -> None:
        with self._counting:
            for _ in range(len(self._uncounted)):
                self._count(self._uncounted.popleft())

    def _count(self, stats: StepStats) -> None:
        self._preemptions += stats.num_preempted
        if stats.num_sequences:
            phase = stats.phase
            self._kv_bytes[phase] += stats.kv_bytes
            self._step_duration[phase].observe(stats.seconds)
            self._batch_size[phase].observe(stats.num_sequences)
        gaps = stats.progress.token_gaps
        self._generation_tokens += len(gaps)
        self._inter_token.observe_all(gaps)
        for prompt in stats.progress.prompts:
            self._prompt_tokens += prompt.num_tokens
            self._prefix_hits += prompt.num_cached_tokens
            if prompt.first_token is not None:
                self._generation_tokens += 1
                self._first_token.observe(prompt.first_token, prompt.request_id)

    def on_finish(self, finish: Finish) -> None:
        usage, timings, request_id = finish.usage, finish.timings, finish.request_id
        self._finished[finish.reason] += 1
        self._e2e.observe(timings.total, request_id)
        self._queue.observe(timings.queue, request_id)
        self._prompt_lengths.observe(usage.prompt_tokens)
        self._generation_lengths.observe(usage.completion_tokens)
        if usage.completion_tokens > 1:
            after_first = timings.total - timings.first_token
            self._per_output_token.observe(after_first / (usage.completion_tokens - 1), request_id)

    def collect(self) -> Iterator[Metric]:
        self._count_steps()
        yield counter(
            "headroom_prompt_tokens",
            "Tokens of prompts whose computation is complete, cached ones included.",
            {(): self._prompt_tokens},
        )
        yield counter(
            "headroom_generation_tokens", "Generated tokens.", {(): self._generation_tokens}
        )
        yield counter(
            "headroom_request_success",
            "Admitted requests that have ended, by the reason.",
            {(reason.name.lower(),): count for reason, count in self._finished.items()},
            ("finish_reason",),
        )
        yield counter(
            "headroom_preemptions",
            "Times that a running request lost its KV blocks to others.",
            {(): self._preemptions},
        )
        yield counter(
            "headroom_prefix_cache_queries",
            "Prompt tokens that were looked up in the prefix cache.",
            {(): self._prompt_tokens if self._prefix_caching else 0},
        )
        yield counter(
            "headroom_prefix_cache_hits",
            "Prompt tokens that the prefix cache supplied.",
            {(): self._prefix_hits},
        )
        yield counter(
            "headroom_step_kv_bytes",
            "Bytes of keys and values that the queries of the steps see.",
            {(phase,): num_bytes for phase, num_bytes in self._kv_bytes.items()},
            ("phase",),
        )
        yield from self._collect_histograms()

    def _collect_histograms(self) -> Iterator[Metric]:
        yield histogram(
            "headroom_step_duration_seconds",
            "Duration of a step; a prefill step has a sequence with more than one token.",
            {(phase,): values for phase, values in self._step_duration.items()},
            ("phase",),
        )
        yield histogram(
            "headroom_batch_size",
            "Sequences in a step.",
            {(phase,): values for phase, values in self._batch_size.items()},
            ("phase",),
        )
        for name, text, values in (
            (
                "time_to_first_token_seconds",
                "From arrival to the first generated token.",
                self._first_token,
            ),
            (
                "inter_token_latency_seconds",
                "Between two generated tokens of a request.",
                self._inter_token,
            ),
            (
                "request_time_per_output_token_seconds",
                "Of one ended request: time after its first token by number of further tokens.",
                self._per_output_token,
            ),
            ("e2e_request_latency_seconds", "From arrival to the end of a request.", self._e2e),
            (
                "request_queue_time_seconds",
                "From arrival until a request first runs, or until its end if it never does.",
                self._queue,
            ),
            ("request_prompt_tokens", "Prompt tokens of an ended request.", self._prompt_lengths),
            (
                "request_generation_tokens",
                "Generated tokens of an ended request.",
                self._generation_lengths,
            ),
        ):
            yield histogram(f"headroom_{name}", text, {(): values})
