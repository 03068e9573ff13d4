"""What a replica exposes: it adds up with what clients saw, and others can read it."""

import asyncio
import random
import re
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as LibraryHistogram
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import models_pb2
from service.metrics.families import histogram
from service.metrics.histogram import SECONDS, Histogram
from tests.serving import RunningServer, running_server
from tests.tools import tool
from tests.traffic import Seen, Total, greedy, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("broken"))


@pytest.fixture
async def server(broken_model: Path) -> AsyncIterator[RunningServer]:
    limits: dict[str, Any] = {"max_model_len": 512, "num_blocks": 64}
    async with running_server(broken_model, enable_prefix_caching=True, **limits) as running:
        yield running


def _samples(registry: CollectorRegistry) -> list[Sample]:
    """What a strict reader of OpenMetrics finds."""
    text = generate_openmetrics(registry).decode()  # type: ignore[no-untyped-call]
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return [sample for family in families for sample in family.samples]


def _scrape(registry: CollectorRegistry) -> Total:
    """Sums over the series of one scrape."""
    samples = _samples(registry)

    def total(name: str, **labels: str) -> float:
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert found, (name, labels)
        return sum(found)

    return total


def _total(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return _scrape(registry)(name, **labels)


async def _rest(call: Any) -> list[pb.GenerateResponse]:
    """What a call that was read from still brings."""
    responses: list[pb.GenerateResponse] = []
    while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        responses.append(response)
    return responses


async def test_the_figures_are_those_that_clients_saw(server: RunningServer) -> None:
    seen = Seen()
    await seen.everything(server.generation)
    assert set(seen.reasons) == {"eos", "stop", "length", "context_full", "deadline", "error"}
    # The scrape follows at once: whatever a client has seen is counted.
    total = _scrape(server.registry)
    seen.check_ends(total)
    seen.check_tokens(total)
    for _ in range(5):
        await seen.cancel(server.generation)
    await server.until_idle()
    seen.check_ends(_scrape(server.registry))


async def test_every_series_is_there_from_the_start(server: RunningServer) -> None:
    def series() -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {(s.name, frozenset(s.labels.items())) for s in _samples(server.registry)}

    before = series()
    for name, labels in before:
        assert {"model", "head_config"} <= dict(labels).keys(), name
    seen = Seen()
    await seen.everything(server.generation)
    assert series() == before


async def test_refusals_are_counted_once_and_by_reason(broken_model: Path) -> None:
    one_at_a_time: dict[str, Any] = {"max_num_seqs": 1, "max_waiting_requests": 1, "num_blocks": 15}
    async with running_server(broken_model, max_model_len=256, **one_at_a_time) as server:
        registry = server.registry

        def total(reason: str) -> float:
            return _total(registry, "headroom_requests_rejected_total", reason=reason)

        running = greedy([1], max_tokens=230)
        running.request_id = "mine"
        open_calls = [server.generation.Generate(running)]
        await open_calls[0].read()
        open_calls.append(server.generation.Generate(greedy([1], max_tokens=1)))
        await server.until(lambda load: load.num_waiting == 1)
        for request, reason in (
            (greedy([1], max_tokens=1), "queue_full"),
            (running, "duplicate_request_id"),
            (greedy([1], max_tokens=250), "never_fits"),
            (greedy([1], top_p=7.0), "invalid_request"),
        ):
            assert total(reason) == 0
            with pytest.raises(grpc.aio.AioRpcError):
                await server.generation.Generate(request).read()
            assert total(reason) == 1, reason
        for call in open_calls:
            await _rest(call)
        assert sum(total(r) for r in ("queue_full", "duplicate_request_id", "never_fits")) == 3
        ended = _total(server.registry, "headroom_request_success_total")
        assert ended == _total(server.registry, "headroom_e2e_request_latency_seconds_count") == 2


async def test_what_was_drained_or_lost_was_not_refused(broken_model: Path) -> None:
    async with running_server(broken_model, max_num_seqs=1) as server:
        calls = [server.generation.Generate(greedy([1], max_tokens=3000))]
        await calls[0].read()
        calls.append(server.generation.Generate(greedy([2], max_tokens=3000)))
        await server.until(lambda load: load.num_waiting == 1)
        await server.engine.drain(0)
        *_, last = await _rest(calls[0])
        assert last.finished.reason == pb.FINISH_REASON_CANCELLED
        with pytest.raises(grpc.aio.AioRpcError, match="stopped before"):
            await calls[1].read()
        assert _total(server.registry, "headroom_requests_rejected_total") == 0
        cancelled = {"finish_reason": "cancelled"}
        assert _total(server.registry, "headroom_request_success_total", **cancelled) == 2
        with pytest.raises(grpc.aio.AioRpcError, match="draining"):
            await server.generation.Generate(greedy([1])).read()
        assert _total(server.registry, "headroom_requests_rejected_total", reason="draining") == 1


async def test_gauges_and_facts_are_those_of_the_model_service(broken_model: Path) -> None:
    async with running_server(broken_model, max_num_seqs=3) as server:
        calls = [server.generation.Generate(greedy([n], max_tokens=3000)) for n in range(5)]
        before = await server.until(lambda load: (load.num_running, load.num_waiting) == (3, 2))
        total = _scrape(server.registry)
        after = await server.load()
        model = await server.models.GetModel(models_pb2.GetModelRequest())
        (facts,) = [s.labels for s in _samples(server.registry) if s.name == "headroom_model_info"]
        for call in calls:
            call.cancel()
        await server.until_idle()
    assert total("headroom_num_requests_running") == 3
    assert total("headroom_num_requests_waiting") == 2
    used = total("headroom_kv_blocks", state="used")
    assert before.kv_blocks_used <= used <= after.kv_blocks_used
    assert total("headroom_kv_blocks") == before.kv_blocks_total
    assert total("headroom_kv_cache_usage_ratio") == used / before.kv_blocks_total
    heads = model.layers[0]
    assert facts["model"] == model.name
    assert facts["head_config"] == heads.label == "h4kv2d16"
    assert facts["attention"] == "gqa"
    for name in ("family", "dtype", "device", "backend", "num_layers", "kv_bytes_per_token"):
        assert facts[name] == str(getattr(model, name)), name
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        assert facts[name] == str(getattr(heads, name)), name


async def test_prefix_cache_hits_are_the_cached_tokens_of_the_answers(
    server: RunningServer,
) -> None:
    prompts = [[7] * 100, [7] * 100, [7] * 50 + [8] * 50]
    cached = 0
    for prompt in prompts:
        request = greedy(prompt, max_tokens=2)
        answer = await server.generation.Complete(
            pb.CompleteRequest.FromString(request.SerializeToString())
        )
        cached += answer.finished.usage.cached_tokens
    assert cached == 96 + 48
    assert _total(server.registry, "headroom_prefix_cache_hits_total") == cached
    assert _total(server.registry, "headroom_prefix_cache_queries_total") == 300
    assert _total(server.registry, "headroom_prompt_tokens_total") == 300


async def test_exemplars_name_requests_where_openmetrics_is_spoken(server: RunningServer) -> None:
    async def exemplars_after(*request_ids: str) -> set[str]:
        for request_id in request_ids:
            request = greedy([1], max_tokens=3)
            request.request_id = request_id
            async for _ in server.generation.Generate(request):
                pass
        found = [sample.exemplar for sample in _samples(server.registry)]
        return {exemplar.labels["request_id"] for exemplar in found if exemplar is not None}

    assert await exemplars_after("y" * 119, 'quoted " and \\', "ü", "a b", "# {") == set()
    assert await exemplars_after("x" * 118) == {"x" * 118}
    assert "# {" not in generate_latest(server.registry).decode()


async def test_promtool_finds_nothing_to_complain_about(server: RunningServer) -> None:
    await Seen().everything(server.generation)
    promtool = await asyncio.create_subprocess_exec(
        tool("promtool"), "check", "metrics", stdin=PIPE, stdout=PIPE, stderr=STDOUT
    )
    complaints, _ = await promtool.communicate(generate_latest(server.registry))
    assert (promtool.returncode, complaints) == (0, b"")


async def test_every_metric_is_documented_and_every_documented_one_exists(
    server: RunningServer,
) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `((?:headroom|grpc)_\w+)", page, re.MULTILINE))
    families = {family.name: family.type for family in server.registry.collect()}
    suffix = {"counter": "_total", "info": "_info"}
    exposed = {
        name + suffix.get(kind, "")
        for name, kind in families.items()
        if name.startswith(("headroom_", "grpc_"))
    }
    # Only a server with tokens has this one: tests/service/auth/test_gate.py.
    assert documented == exposed | {"headroom_token_file_current"}


def test_a_histogram_counts_like_the_librarys() -> None:
    class Ours(Collector):
        def collect(self) -> Iterator[Metric]:
            yield histogram("x_seconds", "Some.", {("a",): ours}, ("k",))

    ours = Histogram(SECONDS)
    registry, expected = CollectorRegistry(), CollectorRegistry()
    registry.register(Ours())
    library = LibraryHistogram("x_seconds", "Some.", ("k",), registry=expected, buckets=SECONDS)
    rng = random.Random(1)
    values = [*SECONDS, 0.0, 1e9, *(rng.lognormvariate(-5, 3) for _ in range(500))]
    for value in values:
        library.labels("a").observe(value)
    for value in values[:100]:
        ours.observe(value)
    ours.observe_all(values[100:])
    assert generate_latest(registry).decode().splitlines() == [
        line for line in generate_latest(expected).decode().splitlines() if "_created" not in line
    ]
