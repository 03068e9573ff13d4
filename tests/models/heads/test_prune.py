"""A pruned model is the original whose heads hand on nothing, or their mean."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.checkpoints.loader import load_model
from models.checkpoints.writer import save_model
from models.config import HeadConfig, ModelConfig, QKNorm
from models.errors import ConfigError
from models.heads.gates import gate_heads, head_means, open_gates
from models.heads.prune import prune
from models.positions import Alibi
from models.transformer import Transformer, random_model
from tests.models.heads.planted import shape, token_ids

BATCHES = [token_ids(0), token_ids(1)]
NEW = token_ids(9)
REMOVED = [(0, 1), (1, 0), (1, 2)]


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def grouped() -> ModelConfig:
    return shape(num_kv_heads=3)


@torch.inference_mode()
def with_gates_shut(model: Transformer, means: list[Tensor]) -> Tensor:
    gates = open_gates(model)
    for layer, head in REMOVED:
        gates[layer][head] = 0.0
    hidden = model.forward_dense(NEW, edit=gate_heads(means, gates))
    return model.project_to_vocab(hidden)


@pytest.mark.parametrize("config", [shape(num_kv_heads=6), grouped()], ids=["mha", "gqa"])
def test_a_mean_becomes_a_bias(config: ModelConfig) -> None:
    model = random_model(config, seed=0)
    pruned = prune(model, REMOVED, BATCHES)
    assert error(pruned.logits(NEW), with_gates_shut(model, head_means(model, BATCHES))) <= 1e-5
    assert error(pruned.logits(NEW), model.logits(NEW)) > 1e-2
    assert [heads.num_kv_heads for heads in pruned.config.layers] == [
        config.layers[0].num_kv_heads - 1,
        config.layers[0].num_kv_heads - 2,
    ]


def test_the_same_as_transformers_with_columns_of_zeros(tmp_path: Path) -> None:
    config = shape(num_kv_heads=6)
    model = random_model(config, seed=0)
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    head_dim = config.layers[0].head_dim
    with torch.no_grad():
        for layer, head in REMOVED:
            columns = slice(head * head_dim, (head + 1) * head_dim)
            theirs.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0.0
        expected = theirs(NEW).logits
    assert error(prune(model, REMOVED, BATCHES, fold_mean=False).logits(NEW), expected) <= 1e-5


def test_what_is_left_is_what_is_counted() -> None:
    model = random_model(shape(num_kv_heads=6), seed=0)
    pruned = prune(model, REMOVED, BATCHES, fold_mean=False)
    heads, hidden = model.config.layers[0], model.config.hidden_size
    each = 4 * heads.head_dim * hidden  # rows of queries, keys, values; columns of the output
    assert model.num_parameters - pruned.num_parameters == len(REMOVED) * each
    kv_bytes = len(REMOVED) * 2 * heads.head_dim * 4
    assert model.config.kv_bytes_per_token() - pruned.config.kv_bytes_per_token() == kv_bytes


def test_nothing_removed_is_the_same_model_and_order_does_not_matter() -> None:
    model = random_model(shape(num_kv_heads=6), seed=0)
    same = prune(model, [], BATCHES)
    assert same.config == model.config
    assert torch.equal(same.logits(NEW), model.logits(NEW))
    orders = (prune(model, order, BATCHES) for order in (REMOVED, REMOVED[::-1]))
    assert error(*(pruned.logits(NEW) for pruned in orders)) == 0.0
    one_by_one = model
    for head in ((0, 1), (1, 2), (1, 0)):  # the last first: the rest keep their numbers
        one_by_one = prune(one_by_one, [head], [], fold_mean=False)
    at_once = prune(model, REMOVED, [], fold_mean=False)
    assert error(one_by_one.logits(NEW), at_once.logits(NEW)) == 0.0


@pytest.mark.parametrize(
    "remove", [REMOVED, [(0, 1), (0, 3), (1, 2), (1, 5)]], ids=["own counts", "one count"]
)
def test_exports_are_read_again(tmp_path: Path, remove: list[tuple[int, int]]) -> None:
    pruned = prune(random_model(shape(num_kv_heads=6), seed=0), remove, BATCHES)
    save_model(pruned, tmp_path)
    assert error(load_model(tmp_path).logits(NEW), pruned.logits(NEW)) == 0.0
    if len(set(pruned.config.layers)) == 1:  # what transformers' Llama can say
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(NEW).logits
        assert error(theirs, pruned.logits(NEW)) <= 1e-5


HEADS = {
    "windows": {"window": (2, 3, 4, 5, None, 7)},
    "temperatures": {"temperature": (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)},
    "sinks": {"learned_sinks": True},
    "alibi": {"alibi": Alibi((0.5, 0.25, 0.1, 0.05, 0.02, 0.01)), "rope": None},
    "norms": {"qk_norm": QKNorm("rms_norm", "each_head", 1e-5)},
}


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS.keys())
def test_what_belongs_to_single_heads_goes_with_them(changes: dict[str, object]) -> None:
    config = shape(num_kv_heads=6)
    heads: HeadConfig = dataclasses.replace(config.layers[0], **changes)  # type: ignore[arg-type]
    model = random_model(config.replace(layers=(heads, heads)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "query_norm.weight", "key_norm.weight")):
                parameter.uniform_(0.5, 2.0, generator=generator)
    pruned = prune(model, REMOVED, BATCHES)
    assert error(pruned.logits(NEW), with_gates_shut(model, head_means(model, BATCHES))) <= 1e-5


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ([(2, 0)], "layer to prune is 2; allowed: 0 to 1"),
        ([(0, 6)], "key/value head to prune of layer 0 is 6; allowed: 0 to 5"),
        (
            [(0, head) for head in range(6)],
            "heads to prune of layer 0 is 'all'; allowed: up to 5 heads: each layer keeps one",
        ),
    ],
)
def test_refusals(remove: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(random_model(shape(num_kv_heads=6), seed=0), remove, BATCHES)


def test_heads_that_are_normalised_together_stay_together() -> None:
    config = shape(num_kv_heads=6, qk_norm=QKNorm("rms_norm", "all_heads", 1e-5))
    with pytest.raises(ConfigError, match="qk_norm is 'all_heads'"):
        prune(random_model(config, seed=0), [(0, 0)], BATCHES)


def test_a_mean_needs_text() -> None:
    with pytest.raises(ConfigError, match=r"batches is \[\]; allowed: one or more"):
        prune(random_model(shape(num_kv_heads=6), seed=0), [(0, 0)], [])
