"""From samples to numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from loadtests.load import Distribution, LoadSummary, StageSummary
from loadtests.samples import Sample
from loadtests.stages import Stage

# A load process that takes more of its core measures itself.
CLIENT_BOUND_CORES = 0.9


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks (Hyndman and Fan's type 7, R's default).

    Args:
        ordered: one value or more, ascending.
    """
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def distribution(seconds: Iterable[float]) -> Distribution | None:
    """Of durations, in milliseconds; None if there are none."""
    ordered = sorted(1000 * value for value in seconds)
    if not ordered:
        return None
    return Distribution(
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def summarize(
    samples: Sequence[Sample],
    *,
    client_cpu: float,
    client_wait: float | None = None,
    began: float,
    stages: Sequence[Stage] = (),
) -> LoadSummary:
    """Over all requests; times are of those that did not fail.

    Args:
        client_cpu: share of one core that the busiest load process took.
        client_wait: seconds per second that a load process waited for a core, if known.
        began: when the load began, in seconds since 1970.
        stages: each is also summed up alone.
    """
    served = [sample for sample in samples if sample.finish_reason is not None]
    failed = [sample for sample in samples if sample.finish_reason is None]
    first = min((sample.start for sample in samples), default=began)
    last = max((sample.start + sample.e2e for sample in samples), default=began)
    seconds = last - first
    output_tokens = sum(sample.output_tokens for sample in samples)
    return LoadSummary(
        requests=len(samples),
        failures=dict(Counter(sample.code for sample in failed)),
        failure_messages={sample.code: sample.message or "" for sample in reversed(failed)},
        rejects_with_retry_info=sum(sample.retry_after is not None for sample in failed),
        finish_reasons=dict(Counter(sample.finish_reason or "" for sample in served)),
        prompt_tokens=sum(sample.prompt_tokens for sample in served),
        output_tokens=output_tokens,
        seconds=seconds,
        requests_per_s=len(served) / seconds if seconds else 0.0,
        output_tokens_per_s=output_tokens / seconds if seconds else 0.0,
        ttft_ms=_ttft(served),
        itl_ms=distribution(gap for sample in served for gap in sample.gaps),
        tpot_ms=distribution(
            (sample.e2e - sample.ttft) / (sample.output_tokens - 1)
            for sample in _whole(served)
            if sample.ttft is not None and sample.output_tokens > 1
        ),
        e2e_ms=_e2e(served),
        delay_ms=distribution(sample.delay for sample in samples),
        client_cpu=client_cpu,
        client_wait=client_wait,
        client_bound=client_cpu > CLIENT_BOUND_CORES,
        began=began,
        stages=[summarize_stage(samples, stage, began) for stage in stages],
    )


def from_dict(fields: dict[str, Any]) -> LoadSummary:
    """What `dataclasses.asdict` made of a summary."""
    stages = [StageSummary(**_with_distributions(stage)) for stage in fields["stages"]]
    return LoadSummary(**_with_distributions(fields) | {"stages": stages})


def _with_distributions(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {
        name: Distribution(**value)
        for name, value in fields.items()
        if name.endswith("_ms") and value is not None
    }


def summarize_stage(samples: Iterable[Sample], stage: Stage, began: float) -> StageSummary:
    """What happened from the stage's start to its end."""
    start, end = began + stage.start, began + stage.end
    started, ended = [], []
    for sample in samples:
        if start <= sample.start < end:
            started.append(sample)
        if start <= sample.start + sample.e2e < end:
            ended.append(sample)
    served = list(_whole(ended))
    return StageSummary(
        start=stage.start,
        end=stage.end,
        load=stage.load,
        started=len(started),
        failed=sum(sample.finish_reason is None for sample in started),
        served_per_s=len(served) / (end - start),
        output_tokens_per_s=sum(sample.output_tokens for sample in served) / (end - start),
        ttft_ms=_ttft(started),
        e2e_ms=_e2e(started),
    )


def _whole(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Those that neither failed nor were left by their client."""
    return (sample for sample in samples if sample.finish_reason not in (None, "cancelled"))


def _ttft(samples: Iterable[Sample]) -> Distribution | None:
    return distribution(
        sample.ttft
        for sample in samples
        if sample.finish_reason is not None and sample.ttft is not None
    )


def _e2e(samples: Iterable[Sample]) -> Distribution | None:
    return distribution(sample.e2e for sample in _whole(samples))
