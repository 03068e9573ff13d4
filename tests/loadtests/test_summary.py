"""Numbers from samples: percentiles against NumPy, the rest by hand."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.client_cpu import CpuMeter, WaitMeter
from loadtests.collector import Collector
from loadtests.load import LoadSpec
from loadtests.samples import Sample, open_samples, read_samples, write_sample
from loadtests.stages import Stage
from loadtests.summary import distribution, from_dict, percentile, summarize
from loadtests.workload import Workload

DURATIONS = st.lists(st.floats(0, 1e4, allow_subnormal=False), min_size=1, max_size=60)


@given(DURATIONS, st.sampled_from([0, 50, 90, 95, 99, 99.9, 100]))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    expected = np.percentile(values, percent)  # its default is linear
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(DURATIONS)
def test_a_distribution_is_in_milliseconds(values: list[float]) -> None:
    found = distribution(values)
    assert found is not None
    expected = 1000 * np.array(values)
    assert found.mean == pytest.approx(expected.mean(), rel=1e-12)
    assert found.max == pytest.approx(expected.max())
    for percent in (50, 90, 95, 99):
        assert getattr(found, f"p{percent}") == pytest.approx(
            np.percentile(expected, percent), rel=1e-9, abs=1e-9
        )


def sample(index: int, **fields: object) -> Sample:
    whole = Sample(
        index=index,
        user=0,
        start=100.0 + index,
        delay=0.0,
        ttft=0.5,
        gaps=[0.25, 0.25],
        e2e=1.0,
        prompt_tokens=10,
        output_tokens=3,
        finish_reason="length",
        code="OK",
        message=None,
        retry_after=None,
    )
    return dataclasses.replace(whole, **fields)  # type: ignore[arg-type]


SAMPLES = [
    sample(0),
    sample(1, ttft=0.1, gaps=[0.4], e2e=0.6, output_tokens=2, finish_reason="cancelled"),
    sample(
        2,
        ttft=None,
        gaps=[],
        e2e=0.01,
        output_tokens=0,
        finish_reason=None,
        code="RESOURCE_EXHAUSTED",
        message="the queue is full",
        retry_after=1.0,
    ),
    sample(3, ttft=0.7, gaps=[], e2e=0.7, output_tokens=1, finish_reason="eos"),
]


def test_a_summary_of_four_requests() -> None:
    summary = summarize(SAMPLES, client_cpu=0.5, began=99.0)
    assert summary.requests == 4
    assert summary.failures == {"RESOURCE_EXHAUSTED": 1}
    assert summary.failure_messages == {"RESOURCE_EXHAUSTED": "the queue is full"}
    assert summary.rejects_with_retry_info == 1
    assert summary.finish_reasons == {"length": 1, "cancelled": 1, "eos": 1}
    assert (summary.prompt_tokens, summary.output_tokens) == (30, 6)
    assert summary.seconds == pytest.approx(3.7)
    assert summary.requests_per_s == pytest.approx(3 / 3.7)
    assert summary.output_tokens_per_s == pytest.approx(6 / 3.7)
    for found, mean, most in (
        (summary.ttft_ms, 1300 / 3, 700),
        (summary.itl_ms, 300, 400),
        (summary.tpot_ms, 250, 250),  # (1 - 0.5) / 2; a single token has none, nor who hung up
        (summary.e2e_ms, 850, 1000),
    ):
        assert found is not None
        assert found.mean == pytest.approx(mean)
        assert found.max == pytest.approx(most)
    assert not summary.client_bound


def test_a_stage_counts_what_starts_and_what_ends_in_it() -> None:
    stage = Stage(start=2.0, end=3.5, load=8.0)  # from 101 to 102.5: request 0 ends, 1 and 2 start
    (found,) = summarize(SAMPLES, client_cpu=0, began=99.0, stages=[stage]).stages
    assert (found.start, found.end, found.load) == (2.0, 3.5, 8.0)
    assert (found.started, found.failed) == (2, 1)
    assert found.served_per_s == pytest.approx(1 / 1.5)
    assert found.output_tokens_per_s == pytest.approx(3 / 1.5)
    assert found.ttft_ms is not None
    assert found.ttft_ms.max == pytest.approx(100)
    assert found.e2e_ms is None


@pytest.mark.parametrize(("cpu", "bound"), [(0.9, False), (0.91, True)])
def test_a_busy_client_is_said_to_be_bound(cpu: float, bound: bool) -> None:
    assert summarize(SAMPLES, client_cpu=cpu, began=99.0).client_bound == bound


def test_nothing_at_all_is_no_division_by_zero() -> None:
    summary = summarize([], client_cpu=0, began=99.0)
    assert (summary.requests, summary.requests_per_s, summary.ttft_ms) == (0, 0, None)


def test_a_summary_survives_json() -> None:
    stage = Stage(start=0.0, end=3.0, load=1.0)
    summary = summarize(SAMPLES, client_cpu=0.25, client_wait=0.125, began=99.0, stages=[stage])
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(summary)))) == summary


def test_the_process_that_waits_most_counts() -> None:
    workload = Workload.parse("fixed:1", "fixed:1")
    collector = Collector(LoadSpec("", workload, users=3), processes=3, path=None)
    for wait in (0.25, None, 0.5):
        collector.add(
            {
                "samples": [],
                "client_cpu": 0.1,
                "client_wait": wait,
                "began": 9.0,
                "over": True,
            }
        )
    assert collector.is_over
    assert collector.close().client_wait == 0.5


def test_samples_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl.gz"
    with open_samples(path) as file:
        for one in SAMPLES:
            write_sample(file, one)
    assert list(read_samples(path)) == SAMPLES


@pytest.mark.parametrize(
    ("readings", "cores"),
    [
        ([(0, 0), (2, 1)], 0.5),  # shorter than a window
        ([(0, 0), (5, 1), (10, 5.5), (15, 6)], 0.9),
        ([(0, 0), (1, 0.8), (2, 1.6), (3, 2.4), (4, 3.2), (5, 3.6), (9, 3.6), (30, 3.7)], 0.72),
    ],
)
def test_the_cpu_meter_finds_the_busiest_five_seconds(
    readings: list[tuple[float, float]], cores: float
) -> None:
    clocks = iter(readings)
    meter = CpuMeter(lambda: next(clocks))
    for _ in readings[2:]:
        meter.update()
    assert meter.busiest() == pytest.approx(cores)


def test_waits_of_threads_that_come_and_go_are_added_up() -> None:
    readings = iter(
        [
            {"main": 3.0, "old": 5.0},  # before the start: not counted
            {"main": 3.5, "old": 5.25},
            {"main": 4.0, "new": 0.5},
            {"main": 4.0, "new": 0.75},
        ]
    )
    times = iter([100.0, 110.0])
    meter = WaitMeter(lambda: next(readings), lambda: next(times))
    for _ in range(2):
        meter.update()
    assert meter.share() == pytest.approx(2.0 / 10)


def test_where_the_kernel_does_not_say_there_is_no_wait() -> None:
    assert WaitMeter(dict).share() is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux counts waits")
def test_a_process_that_shares_its_core_with_another_waits_for_it() -> None:
    cores = os.sched_getaffinity(0)
    one = {min(cores)}
    meter = WaitMeter()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        os.sched_setaffinity(other.pid, one)
        os.sched_setaffinity(0, one)
        try:
            deadline = time.monotonic() + 30
            while (meter.share() or 0.0) < 0.3:  # half of its time, once it has run for a while
                assert time.monotonic() < deadline, meter.share()
        finally:
            os.sched_setaffinity(0, cores)
            other.kill()
