"""What heads add is told by changing one of them, and by the rows of the layers."""

import pytest
import torch
from torch import Tensor

from models.heads.gates import head_means
from models.heads.writing import written_sizes
from models.transformer import Transformer, random_model
from tests.models.heads.planted import shape, token_ids


def _first_layer(model: Transformer, ids: Tensor, *, without: int | None, mean: Tensor) -> Tensor:
    """What the first attention adds, `[batch, tokens, hidden]`, a head handing on its mean."""

    def edit(attended: Tensor) -> Tensor:
        if without is not None:
            attended = attended.clone()
            attended[:, without] = mean
        return attended

    attention, (batch, num_tokens) = model.attentions[0], ids.shape
    positions = torch.arange(num_tokens).repeat(batch)
    rope = attention.heads.rope
    assert rope is not None
    rotation = model.rotation(rope, positions, torch.full_like(positions, num_tokens))
    stream = model.embed_tokens(ids.flatten())
    norm = model.get_submodule("layers.0.attention_norm")
    added = attention.forward_dense(norm(stream), rotation, batch, None, None, edit)
    rows: Tensor = added.double().unflatten(0, (batch, num_tokens))
    return rows


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_sizes_are_those_of_differences(num_kv_heads: int) -> None:
    model = random_model(shape(num_kv_heads=num_kv_heads), seed=0).requires_grad_(False)
    ids = token_ids(0)
    means = head_means(model, [ids])
    sizes = written_sizes(model, ids, means)
    assert [len(layer) for layer in sizes] == [6, 6]
    stream = model.embed_tokens(ids).double()
    whole = _first_layer(model, ids, without=None, mean=means[0][0])
    for head in range(6):
        change = whole - _first_layer(model, ids, without=head, mean=means[0][head])
        expected = change.norm(dim=-1).mean() / stream.norm(dim=-1).mean()
        assert float(sizes[0][head]) == pytest.approx(float(expected), rel=1e-4)


def test_nothing_stays_behind() -> None:
    """Afterwards the model runs as before, without what watched its layers."""
    model = random_model(shape(), seed=0)
    ids = token_ids(0)
    before = model.logits(ids)
    written_sizes(model, ids, head_means(model, [ids]))
    assert torch.equal(model.logits(ids), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
