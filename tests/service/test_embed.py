"""Embed over a real channel, of decoders and of encoders, against transformers."""

import asyncio
import random
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from transformers import BertConfig, BertModel, PreTrainedModel

from protos.headroom.v1 import generation_pb2 as pb
from protos.headroom.v1 import models_pb2
from service.client import AsyncClient, Client, RequestOptions, to_error
from tests import checkpoints
from tests.checkpoints import VOCAB_SIZE, headroom_byte_tokenizer
from tests.serving import RunningServer, running_server

TEXT = "def main(arguments):"
POOLED: dict[str, Any] = {
    "mean": lambda hidden: hidden.mean(dim=0),
    "last": lambda hidden: hidden[-1],
    "first": lambda hidden: hidden[0],
}


def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return checkpoints.randomise(BertModel(config, add_pooling_layer=False))


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(bert(), tmp_path_factory.mktemp("model") / "tiny-bert")


def _hidden(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Final hidden states `[tokens, hidden]` by transformers."""
    with torch.inference_mode():
        base = getattr(model, model.base_model_prefix, model)
        states: torch.Tensor = base(torch.tensor([token_ids])).last_hidden_state[0]
    return states


def _request(token_ids: list[int], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(token_ids=pb.TokenIds(ids=token_ids), **fields)


def _prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
async def test_embedding_is_the_pooled_hidden_state_of_transformers(
    architecture: str, pooling: Any, model_path: Path, encoder_path: Path
) -> None:
    is_decoder = architecture == "decoder"
    path, model = (model_path, checkpoints.llama()) if is_decoder else (encoder_path, bert())
    async with running_server(path) as server, AsyncClient(server.target) as client:
        token_ids = headroom_byte_tokenizer().encode(TEXT)
        expected = POOLED[pooling](_hidden(model, token_ids)).numpy()
        by_text = await client.embed(TEXT, pooling=pooling)
        by_ids = await client.embed(token_ids, pooling=pooling)
        unit = await client.embed(TEXT, pooling=pooling, normalize=True)
    assert by_text.dtype == np.float32
    assert np.abs(by_text - expected).max() <= 1e-5
    assert np.array_equal(by_ids, by_text)
    assert np.abs(unit - expected / np.linalg.norm(expected)).max() <= 1e-5
    assert expected.std() > 0.05, "a vector of zeros proves nothing"


async def test_defaults_tokens_and_usage(server: RunningServer) -> None:
    answer = await server.generation.Embed(pb.EmbedRequest(text=TEXT))
    mean = await server.generation.Embed(pb.EmbedRequest(text=TEXT, pooling="POOLING_MEAN"))
    assert answer == mean
    assert list(answer.token_ids) == headroom_byte_tokenizer().encode(TEXT)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(answer.token_ids), 0)
    assert len(answer.embedding) == 64


@pytest.mark.parametrize("pooling", ["POOLING_MEAN", "POOLING_LAST", "POOLING_FIRST"])
async def test_chunks_batches_and_one_shot_agree(model_path: Path, pooling: str) -> None:
    prompts = _prompts(1, 3, 17, 64, 128)
    answers: list[list[list[float]]] = []
    several: tuple[dict[str, Any], ...] = (
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 5, "max_num_seqs": 3},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"max_num_batched_tokens": 64, "enable_prefix_caching": True},
    )
    for limits in several:
        async with running_server(model_path, **limits) as server:
            for _ in range(2):  # the second time a prefix cache would have something
                calls = [server.generation.Embed(_request(p, pooling=pooling)) for p in prompts]
                answers.append([list(a.embedding) for a in await asyncio.gather(*calls)])
            await server.until_idle()
    for other in answers[1:]:
        for ours, theirs in zip(answers[0], other, strict=True):
            assert np.abs(np.array(ours) - theirs).max() <= 1e-5


async def test_embedding_beside_generations_changes_neither(server: RunningServer) -> None:
    prompts = _prompts(40, 80, 5)
    async with AsyncClient(server.target) as client:
        alone = [await client.embed(prompt) for prompt in prompts]
        text = await client.complete([7, 8], max_tokens=40, temperature=0, ignore_eos=True)
        together, again = await asyncio.gather(
            asyncio.gather(*(client.embed(prompt) for prompt in prompts)),
            client.complete([7, 8], max_tokens=40, temperature=0, ignore_eos=True),
        )
    assert again.token_ids == text.token_ids
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one - other).max() <= 1e-5


async def test_timeout_cancel_and_options(server: RunningServer) -> None:
    late = _request([1, 2, 3], timeout=Duration(nanos=1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Embed(late)
    assert to_error(caught.value).reason == "DEADLINE"
    call = server.generation.Embed(_request([1] * 128))
    await server.load()
    call.cancel()
    await server.until_idle()

    def use() -> np.ndarray[Any, Any]:
        with Client(server.target) as client:
            return client.embed([1, 2], options=RequestOptions(request_id="mine", priority=3))

    assert len(await asyncio.to_thread(use)) == 64


@pytest.mark.parametrize(
    ("request_", "field", "allowed"),
    [
        (pb.EmbedRequest(), "input", "text or token_ids"),
        (pb.EmbedRequest(text=""), "input.text", "at least one character"),
        (_request([]), "input", "1 to 128 tokens"),
        (_request([1] * 129), "input", "1 to 128 tokens"),
        (_request([1, VOCAB_SIZE]), "input.token_ids[1]", f"0 to {VOCAB_SIZE - 1}"),
        (_request([1], pooling=9), "pooling", "MEAN, LAST or FIRST"),
        (_request([1], priority=101), "priority", "-100 to 100"),
        (_request([1], request_id="x" * 129), "request_id", "at most 128"),
    ],
)
async def test_a_wrong_field_is_named(
    server: RunningServer, request_: pb.EmbedRequest, field: str, allowed: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.generation.Embed(request_)
    error = to_error(caught.value)
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert list(error.violations) == [field]
    assert allowed in error.violations[field]


async def test_an_encoder_embeds_and_does_nothing_else(encoder_path: Path) -> None:
    async with running_server(encoder_path) as server:
        model = await server.models.GetModel(models_pb2.GetModelRequest())
        assert not model.is_causal
        prompt = pb.TokenIds(ids=[1, 2])
        for call in (
            server.generation.Complete(pb.CompleteRequest(token_ids=prompt)),
            server.generation.Complete(pb.CompleteRequest()),  # whatever else is wrong
            server.generation.Generate(pb.GenerateRequest(token_ids=prompt)).read(),
            server.generation.Score(pb.ScoreRequest(token_ids=prompt)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            error = to_error(caught.value)
            assert error.code is grpc.StatusCode.UNIMPLEMENTED
            assert error.reason == "MODEL_IS_ENCODER"
            assert "encoder" in str(error)
        assert (await server.generation.Tokenize(pb.TokenizeRequest(text="a"))).token_ids


async def test_an_encoder_computes_each_text_in_one_step(encoder_path: Path) -> None:
    """Beside others, however they fill the steps; a chunk would not see what follows it."""
    prompts = _prompts(64, 1, 40, 30, 64, 2, 63, 20)
    model = bert()
    async with running_server(encoder_path, max_num_batched_tokens=64, max_num_seqs=4) as server:
        calls = [server.generation.Embed(_request(prompt)) for prompt in prompts * 2]
        answers = await asyncio.gather(*calls)
        await server.until_idle()
    for prompt, answer in zip(prompts * 2, answers, strict=True):
        expected = _hidden(model, prompt).mean(dim=0)
        assert (torch.tensor(answer.embedding) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_num_batched_tokens": 63, "max_num_seqs": 4},
            "max_num_batched_tokens is 63; allowed: at least max_model_len=64",
        ),
        ({"enable_prefix_caching": True}, "enable_prefix_caching is true; allowed: false"),
    ],
)
async def test_an_encoder_needs_room_for_a_whole_text(
    encoder_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        async with running_server(encoder_path, **settings):
            pass
    async with running_server(
        encoder_path, max_num_batched_tokens=63, max_num_seqs=4, max_model_len=63
    ) as server:
        assert (await server.generation.Embed(_request([1] * 63))).usage.prompt_tokens == 63
