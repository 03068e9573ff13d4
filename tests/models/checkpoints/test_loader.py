"""Checkpoints load as they are, in every published layout."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import load_model
from models.checkpoints.loader import check_checkpoint, read_config
from models.errors import CheckpointError, ConfigError
from tests import checkpoints
from tests.models.checkpoints.edited import (
    TOKENS,
    Tensors,
    assert_refused,
    assert_same_model,
    copy_of,
    edit_json,
    edit_weights,
)


@pytest.mark.parametrize(
    "make",
    [
        lambda: checkpoints.llama(num_kv_heads=2, attention_bias=True, mlp_bias=True, head_dim=24),
        lambda: checkpoints.llama(num_kv_heads=1, tie_word_embeddings=True),
        lambda: checkpoints.gpt2(scale_attn_by_inverse_layer_idx=True, n_inner=80),
    ],
    ids=["llama-bias", "llama-tied", "gpt2"],
)
def test_a_loaded_model_is_the_one_that_was_saved(
    make: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    theirs = make()
    directory = checkpoints.save(theirs, tmp_path)
    with torch.inference_mode():
        expected = theirs(TOKENS).logits
    model = load_model(str(directory))
    assert (model.logits(TOKENS) - expected).abs().max() <= 1e-5
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert check_checkpoint(directory) == model.config == read_config(directory)


def test_shards_equal_a_single_file(llama: Path, sharded: Path) -> None:
    assert not (sharded / "model.safetensors").exists()
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_same_model(llama, sharded)
    assert check_checkpoint(sharded).layers == check_checkpoint(llama).layers


def test_gpt2_may_leave_out_its_prefix(gpt2: Path, tmp_path: Path) -> None:
    def strip(tensors: Tensors) -> Tensors:
        assert all(name.startswith("transformer.") for name in tensors)
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    assert_same_model(gpt2, edit_weights(gpt2, tmp_path, strip))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_buffers_of_old_gpt2_exports_are_passed_over(
    gpt2: Path, tmp_path: Path, prefix: str
) -> None:
    def add_buffers(tensors: Tensors) -> Tensors:
        renamed = {prefix + name.removeprefix("transformer."): t for name, t in tensors.items()}
        for layer in range(2):
            mask = torch.ones(128, 128, dtype=torch.uint8).tril()[None, None]
            renamed[f"{prefix}h.{layer}.attn.bias"] = mask
            renamed[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return renamed

    assert_same_model(gpt2, edit_weights(gpt2, tmp_path, add_buffers))


def test_buffers_of_old_llama_exports_are_passed_over(llama: Path, tmp_path: Path) -> None:
    def add_buffers(tensors: Tensors) -> Tensors:
        names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
        return tensors | dict.fromkeys(names, torch.ones(8))

    directory = edit_weights(
        llama, tmp_path, lambda tensors: {n: t.clone() for n, t in add_buffers(tensors).items()}
    )
    assert_same_model(llama, directory)


def test_a_head_stored_beside_tied_embeddings_is_passed_over(gpt2: Path, tmp_path: Path) -> None:
    directory = edit_weights(
        gpt2, tmp_path, lambda tensors: tensors | {"lm_head.weight": torch.zeros(259, 64)}
    )
    assert_same_model(gpt2, directory)


def test_the_type_is_the_configurations_unless_asked_for(llama: Path, tmp_path: Path) -> None:
    directory = copy_of(llama, tmp_path)
    edit_json(directory / "config.json", dtype="bfloat16")
    exact, rounded = load_model(llama), load_model(directory)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(rounded.embed_tokens.weight, exact.embed_tokens.weight.bfloat16())
    assert load_model(directory, dtype=torch.float16).dtype == torch.float16
    assert {p.dtype for p in load_model(directory, dtype=torch.float64).parameters()} == {
        torch.float64
    }
    assert load_model(llama, device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_are_widened(
    llama: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    directory = edit_weights(
        llama, tmp_path, lambda tensors: {name: t.to(dtype) for name, t in tensors.items()}
    )
    model, exact = load_model(directory), load_model(llama)
    assert model.dtype == torch.float32
    expected = exact.embed_tokens.weight.to(dtype).float()
    assert torch.equal(model.embed_tokens.weight, expected)


def test_the_kernel_is_the_callers(llama: Path) -> None:
    assert load_model(llama, kernel="reference").kernel_name == "reference"
    with pytest.raises(
        ConfigError, match="allowed: auto, paged_cpu, paged_triton, dense, reference"
    ):
        load_model(llama, kernel="flash")  # type: ignore[arg-type]


# --- end-of-sequence ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "merged"),
    [
        (257, None, (257,)),
        (257, 257, (257,)),
        (257, [258, 257, 3], (257, 258, 3)),
        ([257, 258], [3], (257, 258, 3)),
        (None, [258, 3], (258, 3)),
        (None, None, ()),
    ],
)
def test_ending_tokens_come_from_both_files(
    llama: Path, tmp_path: Path, config: object, generation: object, merged: tuple[int, ...]
) -> None:
    directory = copy_of(llama, tmp_path)
    edit_json(directory / "config.json", eos_token_id=config)
    edit_json(directory / "generation_config.json", eos_token_id=generation)
    assert read_config(directory).eos_token_ids == merged
    assert load_model(directory).config.eos_token_ids == merged


def test_generation_settings_may_be_missing_but_not_broken(llama: Path, tmp_path: Path) -> None:
    directory = copy_of(llama, tmp_path)
    file = directory / "generation_config.json"
    file.unlink()
    assert read_config(directory).eos_token_ids == (257,)
    file.write_text("{")
    assert_refused(directory, "generation_config.json")
    file.write_text('{"eos_token_id": 259}')
    with pytest.raises(ConfigError, match=r"eos_token_id is 259; allowed: 0 to 258"):
        read_config(directory)


def write_sparse(file: Path, shapes: dict[str, list[int]]) -> int:
    """A safetensors file of zeros that takes no space, whatever its size; returns the size."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + end)
    return file.stat().st_size


def test_a_check_reads_no_weights(llama: Path, tmp_path: Path) -> None:
    """A checkpoint larger than any memory is checked by its header alone."""
    directory = copy_of(llama, tmp_path)
    file = directory / "model.safetensors"
    stored = {name: list(tensor.shape) for name, tensor in load_file(file).items()}
    edit_json(directory / "config.json", vocab_size=2_000_000_000)
    larger = {name: [2_000_000_000 if n == 259 else n for n in s] for name, s in stored.items()}
    assert write_sparse(file, larger) > 1e12
    try:
        assert check_checkpoint(directory).vocab_size == 2_000_000_000
        edit_json(directory / "config.json", vocab_size=259)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[2000000000, 64\]"):
            check_checkpoint(directory)
    finally:
        file.unlink()
