"""Files that do not hold the configured model are refused, and the message names what is wrong."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import load_model
from tests.models.checkpoints.edited import (
    Tensors,
    assert_refused,
    copy_of,
    edit_json,
    edit_weights,
)

_UP = "model.layers.1.mlp.up_proj.weight"
_NORM = "model.norm.weight"


def _without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


PROBLEMS: dict[str, tuple[Callable[[Tensors], Tensors], tuple[str, ...]]] = {
    "missing": (lambda t: _without(t, _UP), (f"missing {_UP}",)),
    "unexpected": (
        lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)},
        ("unexpected model.layers.2.mlp.up_proj.weight",),
    ),
    "unexpected bias": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)},
        ("unexpected model.layers.0.self_attn.q_proj.bias",),
    ),
    "renamed": (
        lambda t: _without(t, _NORM) | {"norm.weight": t[_NORM]},
        (f"missing {_NORM}", "unexpected norm.weight"),
    ),
    "wrong shape": (
        lambda t: t | {_UP: torch.zeros(96, 65)},
        (f"{_UP} has shape [96, 65], the configuration needs [96, 64]",),
    ),
    "transposed": (
        lambda t: t | {_UP: t[_UP].T.contiguous()},
        (f"{_UP} has shape [64, 96], the configuration needs [96, 64]",),
    ),
    "scalar": (
        lambda t: t | {_NORM: torch.tensor(1.0)},
        (f"{_NORM} has shape [], the configuration needs [64]",),
    ),
    "integers": (
        lambda t: t | {_NORM: torch.ones(64, dtype=torch.int64)},
        (f"{_NORM} has dtype I64, allowed: F32, F16, BF16",),
    ),
    "eight bits": (
        lambda t: t | {_UP: t[_UP].to(torch.float8_e4m3fn)},
        (f"{_UP} has dtype F8_E4M3, allowed: F32, F16, BF16",),
    ),
    "nothing": (lambda t: {}, ("missing model.embed_tokens.weight", "and 13 more")),
    "several": (
        lambda t: _without(t, _UP) | {_NORM: torch.zeros(3), "extra": torch.zeros(1)},
        (f"missing {_UP}", f"{_NORM} has shape [3]", "unexpected extra"),
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_tensors_that_do_not_fit_are_named(llama: Path, tmp_path: Path, problem: str) -> None:
    edit, words = PROBLEMS[problem]
    assert_refused(edit_weights(llama, tmp_path, edit), "the weights of 'copy'", *words)


def test_a_missing_head_is_named_when_embeddings_are_not_tied(llama: Path, tmp_path: Path) -> None:
    directory = edit_weights(llama, tmp_path, lambda t: _without(t, "lm_head.weight"))
    assert_refused(directory, "missing lm_head.weight")
    edit_json(directory / "config.json", tie_word_embeddings=True)
    assert load_model(directory).lm_head is None


def test_a_configuration_of_another_size_is_refused(gpt2: Path, tmp_path: Path) -> None:
    directory = copy_of(gpt2, tmp_path)
    edit_json(directory / "config.json", n_positions=64)
    assert_refused(directory, "wpe.weight has shape [128, 64], the configuration needs [64, 64]")
    edit_json(directory / "config.json", n_positions=128, n_layer=3)
    assert_refused(directory, "missing h.2.attn.c_attn.weight", "and 4 more")
    edit_json(directory / "config.json", n_layer=1)
    assert_refused(directory, "unexpected h.1.attn.c_attn.weight")


def test_gpt2_weights_that_are_not_transposed_are_refused(gpt2: Path, tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    directory = edit_weights(gpt2, tmp_path, lambda t: t | {name: t[name].T.contiguous()})
    assert_refused(directory, "h.0.attn.c_attn.weight has shape [192, 64]", "needs [64, 192]")


# --- damaged files -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 8, 9, 300, 3000, -1])
def test_a_truncated_file_is_named(llama: Path, tmp_path: Path, keep: int) -> None:
    directory = copy_of(llama, tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(directory, f"{file} is not a readable safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 200,
        b"PK\x03\x04" + bytes(100),
        struct.pack("<Q", 6) + b'{"a":1',
        struct.pack("<Q", 8) + b'{"a":[]}',
        struct.pack("<Q", 2**40) + b"{}",
    ],
    ids=["noise", "zip", "half a header", "no tensor", "huge header"],
)
def test_a_garbage_header_is_named(llama: Path, tmp_path: Path, content: bytes) -> None:
    directory = copy_of(llama, tmp_path)
    (directory / "model.safetensors").write_bytes(content)
    assert_refused(directory, "model.safetensors is not a readable safetensors file")


def test_a_directory_in_place_of_the_file_is_named(llama: Path, tmp_path: Path) -> None:
    directory = copy_of(llama, tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").mkdir()
    assert_refused(directory, "model.safetensors is not a readable safetensors file")


def test_formats_that_can_run_code_are_not_read(llama: Path, tmp_path: Path) -> None:
    directory = copy_of(llama, tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert_refused(
        directory, "neither model.safetensors nor model.safetensors.index.json", "can run code"
    )


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    directory = copy_of(sharded, tmp_path)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    assert_refused(directory, f"{shard} is missing", "model.safetensors.index.json names it")


def test_a_truncated_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    directory = copy_of(sharded, tmp_path)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(directory, f"{shard} is not a readable safetensors file")


@pytest.mark.parametrize(
    "name", ["../copy/{}", "/etc/passwd", "sub/{}", "./{}", "..", "", ".", 7, None, ["{}"]]
)
def test_a_shard_outside_of_the_directory_is_not_read(
    sharded: Path, tmp_path: Path, name: object
) -> None:
    directory = copy_of(sharded, tmp_path)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for tensor, file in weight_map.items():
        # The path would lead to the very file: only its form is wrong.
        weight_map[tensor] = name.format(file) if isinstance(name, str) else name
    edit_json(index, weight_map=weight_map)
    assert_refused(directory)


@pytest.mark.parametrize("name", ["../copy/{}", "/etc/passwd", "sub/{}", "./{}"])
def test_the_path_of_a_shard_outside_is_in_the_message(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    directory = copy_of(sharded, tmp_path)
    edit_json(directory / "model.safetensors.index.json", weight_map={"a": name})
    assert_refused(directory, "names a shard outside of the directory", name)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map_is_named(sharded: Path, tmp_path: Path, weight_map: object) -> None:
    directory = copy_of(sharded, tmp_path)
    edit_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    assert_refused(directory, "model.safetensors.index.json has no weight_map")


def test_an_index_that_is_no_json_is_named(sharded: Path, tmp_path: Path) -> None:
    directory = copy_of(sharded, tmp_path)
    (directory / "model.safetensors.index.json").write_text("{")
    assert_refused(directory, "model.safetensors.index.json cannot be read as JSON")


def test_a_path_without_a_model_is_named(tmp_path: Path, llama: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere is not a directory")
    assert_refused(llama / "config.json", "config.json is not a directory")
    assert_refused(tmp_path, "config.json is missing")
