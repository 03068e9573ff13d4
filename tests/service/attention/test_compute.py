"""Attend over a real channel, against loops over numbers and against torch."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from models import load_model
from models.split_attention import split_attention
from models.transformer import Transformer
from protos.headroom.v1 import attention_pb2 as pb
from protos.headroom.v1 import tensor_pb2
from service.client import AsyncClient
from tests import checkpoints
from tests.service.attention import variants
from tests.service.attention.variants import CASES, HEADS, KEYS, QUERIES
from tests.serving import RunningServer, running_server

Implementation = Literal["fused", "split"]
LAYOUTS = {
    "batch_heads_tokens_dim": (0, 1, 2, 3),
    "batch_tokens_heads_dim": (0, 2, 1, 3),
    "tokens_batch_heads_dim": (2, 0, 1, 3),
}


def _sdpa(parts: list[torch.Tensor], *, is_causal: bool = False) -> torch.Tensor:
    query, key, value = parts
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=True
    )


@pytest.fixture
async def client(server: RunningServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target) as opened:
        yield opened


@pytest.mark.parametrize("name", CASES)
async def test_every_variant_is_what_its_formula_says(client: AsyncClient, name: str) -> None:
    case, given = CASES[name], variants.tensors()
    reads = variants.expected(case, *given)
    outputs = np.stack([read.output for read in reads])
    sent: Any = {"layout": "batch_heads_tokens_dim", **case.sent}
    fused = await client.attend(*given, **sent)
    assert fused.backend == "dense"
    assert np.abs(fused.output - outputs).max() <= case.bar
    for implementation, backend in (("fused", "reference"), ("split", "split")):
        sent |= {"implementation": implementation, "want_weights": True, "want_lse": True}
        answer = await client.attend(*given, **sent, want_head_outputs=implementation == "split")
        assert answer.backend == backend
        assert np.abs(answer.output - outputs).max() <= case.bar
        assert answer.weights is not None and answer.lse is not None  # noqa: PT018
        weights, lse = (np.stack([getattr(r, n) for r in reads]) for n in ("weights", "lse"))
        assert np.abs(answer.weights - weights).max() <= case.bar
        np.testing.assert_allclose(answer.lse, lse, rtol=0, atol=10 * case.bar)
        assert answer.weights.dtype == answer.lse.dtype == np.float64
        assert np.array_equal(answer.weights == 0, weights == 0), "hidden is exactly 0"
        if implementation == "split":
            assert np.array_equal(answer.head_outputs, answer.output)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_every_variant_changes_the_result(name: str) -> None:
    """Otherwise ignoring it would pass, too."""
    if name == "causal":
        return
    case, given = CASES[name], variants.tensors()
    plain, changed = (
        np.stack([read.output for read in variants.expected(each, *given)])
        for each in (CASES["causal"], case)
    )
    assert np.abs(plain - changed).max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_each_layout_in_and_out(client: AsyncClient, layout: Any) -> None:
    axes, given = LAYOUTS[layout], variants.tensors()
    plain = await client.attend(*given, layout="batch_heads_tokens_dim", mask="causal")
    moved = await client.attend(
        *(part.transpose(axes) for part in given),
        layout=layout,
        mask="causal",
        implementation="split",
        want_head_outputs=True,
    )
    assert moved.output.shape == tuple(plain.output.shape[axis] for axis in axes)
    assert np.abs(moved.output - plain.output.transpose(axes)).max() <= 1e-12
    assert moved.head_outputs is not None
    assert moved.head_outputs.shape == plain.output.shape, "heads first, whatever the layout"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["fused", "split"])
async def test_torch_tensors_of_every_type_against_sdpa(
    client: AsyncClient, dtype: str, implementation: Implementation
) -> None:
    kind = getattr(torch, dtype)
    exact = [torch.from_numpy(part).to(kind) for part in variants.tensors(num_queries=KEYS)]
    answer = await client.attend(
        *exact,
        layout="batch_heads_tokens_dim",
        mask="causal",
        implementation=implementation,
        want_lse=implementation == "split",
    )
    assert isinstance(answer.output, torch.Tensor)
    assert answer.output.dtype is kind
    truth = _sdpa([part.double() for part in exact], is_causal=True)
    theirs = _sdpa(exact, is_causal=True)
    error = (answer.output.double() - truth).abs().max().item()
    their_error = (theirs.double() - truth).abs().max().item()
    assert error <= max(2 * their_error, 1e-12)
    if answer.lse is not None:
        assert answer.lse.dtype is (torch.float64 if dtype == "float64" else torch.float32)


async def test_bfloat16_answers_become_float32_in_numpy(server: RunningServer) -> None:
    given = [torch.from_numpy(part).bfloat16() for part in variants.tensors()]
    request = pb.AttendRequest(
        qkv=pb.QKV(layout="LAYOUT_BATCH_HEADS_TOKENS_DIM"),
        variant=pb.Variant(mask="MASK_KIND_CAUSAL"),
    )
    for name, part in zip(("query", "key", "value"), given, strict=True):
        stored = part.view(torch.int16).numpy().astype("<u2")
        getattr(request.qkv, name).CopyFrom(
            tensor_pb2.Tensor(dtype="DATA_TYPE_BFLOAT16", shape=stored.shape, data=stored.tobytes())
        )
    answer = await server.attention.Attend(request)
    assert answer.output.dtype == tensor_pb2.DATA_TYPE_BFLOAT16
    async with AsyncClient(server.target) as client:
        again = await client.attend(*given, layout="batch_heads_tokens_dim", mask="causal")
    bits = np.frombuffer(answer.output.data, "<u2").astype("<u4") << 16
    assert np.array_equal(bits.view("<f4"), again.output.float().numpy().ravel())


async def test_data_is_little_endian_in_c_order(server: RunningServer) -> None:
    query, key, value = (part.astype(np.float32) for part in variants.tensors())

    def message(part: Any) -> tensor_pb2.Tensor:
        return tensor_pb2.Tensor(
            dtype="DATA_TYPE_FLOAT32", shape=part.shape, data=part.astype("<f4").tobytes()
        )

    answer = await server.attention.Attend(
        pb.AttendRequest(
            qkv=pb.QKV(
                query=message(query),
                key=message(key),
                value=message(value),
                layout="LAYOUT_BATCH_HEADS_TOKENS_DIM",
            ),
            variant=pb.Variant(mask="MASK_KIND_BIDIRECTIONAL"),
        )
    )
    output = np.frombuffer(answer.output.data, "<f4").reshape(answer.output.shape)
    theirs = _sdpa([torch.from_numpy(part) for part in (query, key, value)])
    assert np.abs(output - theirs.numpy()).max() <= 2e-6
    assert not answer.HasField("weights")
    assert not answer.HasField("lse")
    assert not answer.HasField("head_outputs")


async def test_more_queries_than_keys_without_positions(client: AsyncClient) -> None:
    query, key, value = variants.tensors(num_queries=KEYS + 3)
    answer = await client.attend(
        query, key, value, layout="batch_heads_tokens_dim", mask="bidirectional"
    )
    theirs = _sdpa([torch.from_numpy(part) for part in (query, key, value)])
    assert np.abs(answer.output - theirs.numpy()).max() <= 1e-12


async def test_one_query_behind_a_cache_sees_all(client: AsyncClient) -> None:
    query, key, value = variants.tensors()
    whole = await client.attend(query, key, value, layout="batch_heads_tokens_dim", mask="causal")
    last = await client.attend(
        query[:, :, -1:], key, value, layout="batch_heads_tokens_dim", mask="causal"
    )
    assert np.abs(last.output[:, :, 0] - whole.output[:, :, QUERIES - 1]).max() <= 1e-12


async def test_multi_head_and_multi_query(client: AsyncClient) -> None:
    query, key, value = variants.tensors()
    wide = [np.repeat(part, HEADS // part.shape[1], axis=1) for part in (query, key, value)]
    few = await client.attend(query, key, value, layout="batch_heads_tokens_dim", mask="causal")
    many = await client.attend(*wide, layout="batch_heads_tokens_dim", mask="causal")
    assert np.abs(few.output - many.output).max() <= 1e-12
    one = await client.attend(
        query, key[:, :1], value[:, :1], layout="batch_heads_tokens_dim", mask="causal"
    )
    assert np.abs(one.output[:, 0] - few.output[:, 0]).max() <= 1e-12


class TestHidden:
    """The served model's own layers."""

    @staticmethod
    def hidden(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(4))

    @staticmethod
    def fused(model: Transformer, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        attention: Any = model.layers[layer].attention
        positions = torch.arange(hidden.shape[0])
        turn = model.rotation(attention.heads.rope, positions)
        with torch.inference_mode():
            output: torch.Tensor = attention.forward_dense(hidden, turn, 1)
        return output

    async def test_fused_split_and_reference_are_the_layer(
        self, client: AsyncClient, model_path: Path
    ) -> None:
        model, hidden = load_model(model_path), self.hidden(2, 11, 64)
        for layer in (0, 1):
            truth = torch.stack([self.fused(model, row, layer) for row in hidden])
            attention: Any = model.layers[layer].attention
            turn = model.rotation(attention.heads.rope, torch.arange(11))
            with torch.inference_mode():
                split = split_attention(attention, hidden[1], turn)
            plain = await client.attend_hidden(hidden, layer=layer)
            fused = await client.attend_hidden(
                hidden, layer=layer, want_weights=True, want_lse=True
            )
            apart = await client.attend_hidden(
                hidden,
                layer=layer,
                implementation="split",
                want_weights=True,
                want_lse=True,
                want_head_outputs=True,
            )
            backends = [answer.backend for answer in (plain, fused, apart)]
            assert backends == ["dense", "reference", "split"]
            for answer in (plain, fused, apart):
                assert (answer.output - truth).abs().max() <= 2e-5
            for answer in (fused, apart):
                assert answer.weights is not None and answer.lse is not None  # noqa: PT018
                assert (answer.weights[1] - split.weights).abs().max() <= 1e-6
                assert (answer.lse[1] - split.lse).abs().max() <= 1e-5
            assert apart.head_outputs is not None
            assert apart.head_outputs.shape == (2, 4, 11, 64)
            assert (apart.head_outputs.sum(dim=1) - truth).abs().max() <= 2e-5

    async def test_one_row_of_numpy(self, client: AsyncClient, model_path: Path) -> None:
        hidden = self.hidden(5, 64)
        answer = await client.attend_hidden(hidden.numpy(), layer=1, want_weights=True)
        assert isinstance(answer.output, np.ndarray)
        truth = self.fused(load_model(model_path), hidden, 1)
        assert np.abs(answer.output - truth.numpy()).max() <= 2e-5
        assert answer.weights is not None
        assert answer.weights.shape == (1, 4, 5, 5)

    async def test_biases_and_learned_positions(self, tmp_path: Path) -> None:
        path = checkpoints.save(checkpoints.gpt2(), tmp_path / "gpt2")
        model, hidden = load_model(path), self.hidden(6, 64)
        attention: Any = model.layers[0].attention
        with torch.inference_mode():
            truth = attention.forward_dense(hidden, None, 1)
        async with running_server(path) as server, AsyncClient(server.target) as client:
            plain = await client.attend_hidden(hidden, layer=0)
            apart = await client.attend_hidden(
                hidden, layer=0, implementation="split", want_head_outputs=True
            )
        assert (plain.output - truth).abs().max() <= 2e-5
        assert apart.head_outputs is not None
        summed = apart.head_outputs[0].sum(dim=0) + attention.output.bias
        assert (summed - truth).abs().max() <= 2e-5, "heads and bias sum to the output"

    async def test_an_encoder_looks_both_ways(self, tmp_path: Path) -> None:
        config = BertConfig(
            vocab_size=checkpoints.VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=32,
            attn_implementation="eager",
        )
        bert: Any = checkpoints.randomise(BertModel(config, add_pooling_layer=False))
        path, hidden = checkpoints.save(bert, tmp_path / "bert"), self.hidden(2, 6, 64)
        module = bert.encoder.layer[0].attention
        with torch.inference_mode():
            read, weights = module.self(hidden)
            truth = module.output.dense(read)
        async with running_server(path) as server, AsyncClient(server.target) as client:
            plain = await client.attend_hidden(hidden, layer=0)
            apart = await client.attend_hidden(
                hidden, layer=0, implementation="split", want_weights=True
            )
        for answer in (plain, apart):
            assert (answer.output - truth).abs().max() <= 2e-5
        assert apart.weights is not None
        assert (apart.weights - weights).abs().max() <= 1e-6

    async def test_a_bfloat16_model_computes_and_answers_in_its_type(
        self, model_path: Path
    ) -> None:
        model, hidden = load_model(model_path, dtype=torch.bfloat16), self.hidden(9, 64)
        async with (
            running_server(model_path, dtype="bfloat16") as server,
            AsyncClient(server.target) as client,
        ):
            answer = await client.attend_hidden(hidden, layer=0)
            array = await client.attend_hidden(hidden.numpy(), layer=0)
        assert answer.output.dtype is torch.bfloat16
        assert torch.equal(answer.output, self.fused(model, hidden.bfloat16(), 0))
        assert array.output.dtype == np.float32
        assert np.array_equal(array.output, answer.output.float().numpy())
