"""Loads that locust really runs, against times and counts that others know."""

import asyncio
import itertools
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtests import asyncio_client
from loadtests.load import LoadSpec
from loadtests.run import LoadError, run_load
from loadtests.samples import read_samples
from loadtests.workload import Lengths, Workload
from service.runtimes.ray_environment import free_ports
from tests.loadtests.conftest import PACED_MAX_OPEN, RealServer
from tests.loadtests.paced_server import FIRST_TOKEN, GAP

pytestmark = pytest.mark.alone

EIGHT_TOKENS = Workload(Lengths.parse("fixed:4"), Lengths.parse("fixed:8"))
_E2E = FIRST_TOKEN + 7 * GAP
_AGREEMENT = 0.05
_LATE = 0.2


def test_locust_an_asyncio_client_and_the_clock_agree(paced_target: str) -> None:
    """In one of three attempts. The clock is that of the server, which a busy machine wakes late,
    for all clients alike, and never early."""
    spec = LoadSpec(paced_target, EIGHT_TOKENS, users=4, num_requests=16)
    by_clock = {
        "ttft_ms": 1000 * FIRST_TOKEN,
        "itl_ms": 1000 * GAP,
        "tpot_ms": 1000 * GAP,
        "e2e_ms": 1000 * _E2E,
    }
    differences: list[dict[str, Any]] = []
    for _ in range(3):
        summaries = (run_load(spec), asyncio.run(asyncio_client.run_load(spec)))
        for summary in summaries:
            assert (summary.requests, summary.output_tokens, summary.failures) == (16, 128, {})
        found = [{name: getattr(one, name).p50 for name in by_clock} for one in summaries]
        rates = [one.output_tokens_per_s for one in summaries]
        if (
            all(
                1 - _AGREEMENT < one[name] / wanted < 1 + _LATE
                for one in found
                for name, wanted in by_clock.items()
            )
            and found[0] == pytest.approx(found[1], rel=_AGREEMENT)
            and rates == pytest.approx([4 * 8 / _E2E] * 2, rel=_LATE)
            and rates[0] == pytest.approx(rates[1], rel=2 * _AGREEMENT)
        ):
            return
        differences += found
    pytest.fail(f"{differences} against {by_clock}")


def test_an_open_loop_counts_from_the_arrival(paced_target: str, tmp_path: Path) -> None:
    # One user serves two requests per second; ten arrive.
    path = tmp_path / "samples.jsonl.gz"
    spec = LoadSpec(paced_target, EIGHT_TOKENS, users=1, rate=10, num_requests=5)
    summary = run_load(spec, path)
    samples = sorted(read_samples(path), key=lambda sample: sample.index)
    for before, sample in itertools.pairwise(samples):
        assert sample.start + sample.delay >= before.start + before.e2e
        assert sample.e2e == pytest.approx(sample.delay + _E2E, rel=_AGREEMENT)
        assert sample.start < before.start + before.e2e  # due while the only user was busy
    assert summary.e2e_ms is not None
    assert summary.e2e_ms.max > 3 * 1000 * _E2E
    assert summary.delay_ms is not None
    assert summary.delay_ms.max > 2 * 1000 * _E2E
    # The arrivals are the same for every client.
    by_asyncio = asyncio.run(asyncio_client.run_load(spec))
    assert by_asyncio.e2e_ms is not None
    assert by_asyncio.e2e_ms.max == pytest.approx(summary.e2e_ms.max, rel=_AGREEMENT)


def test_processes_send_exactly_what_is_asked(paced_target: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl.gz"
    workload = Workload(Lengths.parse("uniform:3-6"), Lengths.parse("uniform:1-4"), seed=3)
    reports: list[int] = []
    spec = LoadSpec(paced_target, workload, users=5, num_requests=23, processes=2)
    summary = run_load(spec, path, reports.append)
    samples = list(read_samples(path))
    assert sorted(sample.index for sample in samples) == list(range(23))
    for sample in samples:
        request = workload.request(sample.index, vocab_size=50)
        assert sample.prompt_tokens == len(request.token_ids)
        assert sample.output_tokens == request.max_tokens
    assert {sample.user % 2 for sample in samples} == {0, 1}
    assert summary.requests == 23
    assert reports == sorted(reports)
    assert reports[-1] == 23


def test_what_a_full_queue_refuses_is_counted_with_its_advice(paced_target: str) -> None:
    users = PACED_MAX_OPEN + 4
    summary = run_load(LoadSpec(paced_target, EIGHT_TOKENS, users=users, num_requests=users))
    assert summary.failures == {"RESOURCE_EXHAUSTED": 4}
    assert summary.rejects_with_retry_info == 4
    assert "the queue is full" in summary.failure_messages["RESOURCE_EXHAUSTED"]
    assert summary.finish_reasons == {"length": PACED_MAX_OPEN}


def test_a_shape_raises_the_number_of_users(paced_target: str) -> None:
    spec = LoadSpec(paced_target, EIGHT_TOKENS, users=2, seconds=4, shape="steps")
    first, second = run_load(spec).stages
    assert (first.load, second.load) == (1, 2)
    # One user sends about four requests in two seconds; locust looks at the shape every second.
    assert 0 < first.started < second.started


def _counters(url: str) -> Counter[str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    counts: Counter[str] = Counter()
    for family in families:
        for sample in family.samples:
            reason = sample.labels.get("finish_reason") or sample.labels.get("reason") or ""
            counts[f"{sample.name} {reason}".strip()] += int(sample.value)
    return counts


def test_locusts_counts_are_the_servers(real_server: RealServer) -> None:
    workload = Workload(Lengths.parse("uniform:3-20"), Lengths.parse("lognormal:8,0.7,24"))
    before = _counters(real_server.metrics_url)
    summary = run_load(LoadSpec(real_server.target, workload, users=16, num_requests=40))
    counted = _counters(real_server.metrics_url) - before
    served = summary.finish_reasons["length"]
    refused = summary.failures["RESOURCE_EXHAUSTED"]  # more users than queue and batch hold
    assert served + refused == summary.requests == 40
    assert counted["headroom_request_success_total length"] == served
    assert counted["headroom_requests_rejected_total queue_full"] == refused
    assert counted["headroom_prompt_tokens_total"] == summary.prompt_tokens
    assert counted["headroom_generation_tokens_total"] == summary.output_tokens
    assert counted["headroom_time_to_first_token_seconds_count"] == served
    assert summary.rejects_with_retry_info == refused


def test_clients_that_hang_up_end_their_requests(real_server: RealServer) -> None:
    workload = Workload(Lengths.parse("fixed:4"), Lengths.parse("fixed:400"), hang_up=1.0)
    before = _counters(real_server.metrics_url)
    summary = run_load(LoadSpec(real_server.target, workload, users=3, num_requests=3))
    assert summary.finish_reasons == {"cancelled": 3}
    assert summary.failures == {}
    assert summary.output_tokens == 3 * 200
    deadline = time.monotonic() + 10
    name = "headroom_request_success_total cancelled"
    while (_counters(real_server.metrics_url) - before)[name] < 3:
        assert time.monotonic() < deadline, "the server goes on without a client"


def test_no_server_is_one_clear_message() -> None:
    (port,) = free_ports(1)
    with pytest.raises(LoadError, match=f"127.0.0.1:{port} does not say what it serves: UNAVAIL"):
        run_load(LoadSpec(f"127.0.0.1:{port}", EIGHT_TOKENS, users=1, num_requests=1))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/null/samples.gz", "samples is '/dev/null/samples.gz': Not a directory; allowed: "),
        ("/dev/full", "samples cannot be written: No space left on device"),
    ],
)
def test_samples_that_cannot_be_written_end_the_load(
    paced_target: str, path: str, reason: str, processes: int
) -> None:
    spec = LoadSpec(paced_target, EIGHT_TOKENS, users=2, num_requests=2, processes=processes)
    with pytest.raises(LoadError, match=reason):
        run_load(spec, Path(path))


@pytest.mark.parametrize("client", [run_load, asyncio_client.run_load])
def test_a_load_without_an_end_is_refused(client: Any) -> None:
    with pytest.raises(ValueError, match="at least one of them"):
        asyncio.run(client(LoadSpec("127.0.0.1:9000", EIGHT_TOKENS, users=1)))
