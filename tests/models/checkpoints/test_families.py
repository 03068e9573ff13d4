"""Checkpoints of every family, as published ones are written, and what damage does to them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from models import load_model
from models.checkpoints.families import FAMILIES
from models.checkpoints.loader import check_checkpoint, read_config
from tests import checkpoints
from tests.models.checkpoints import version4
from tests.models.checkpoints.edited import assert_refused, copy_of, edit_json, edit_weights
from tests.parity import measure
from tests.parity.row import Row
from tests.parity.rows import ROWS

BY_NAME = {row.name: row for row in ROWS}
# The first row of each family.
FIRST = {row.family: row for row in reversed(ROWS)}
TOKENS = measure.tokens(2, 20)


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Row], Path]:
    """The checkpoint of a row, written by transformers once."""
    written: dict[str, Path] = {}

    def directory(row: Row) -> Path:
        if row.name not in written:
            path = tmp_path_factory.mktemp("family")
            written[row.name] = measure.make_pair(row, path).path
        return written[row.name]

    return directory


# --- the dialect of version 4 ------------------------------------------------------------------


def test_every_family_has_a_configuration_of_version_4() -> None:
    assert {fields["model_type"] for fields in version4.CONFIGS.values()} == set(FAMILIES)
    for fields in version4.CONFIGS.values():
        assert not {"rope_parameters", "layer_types", "dtype"} & set(fields)


@pytest.mark.parametrize("name", version4.CONFIGS)
def test_both_dialects_are_the_same_model(
    name: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    newer = directory_of(BY_NAME[name])
    older = copy_of(newer, tmp_path)
    (older / "config.json").write_text(json.dumps(version4.CONFIGS[name]))
    assert read_config(older).replace(name="") == read_config(newer).replace(name="")
    assert torch.equal(_logits(older), _logits(newer))


@pytest.mark.parametrize("name", version4.CONFIGS)
def test_transformers_reads_the_older_dialect_alike(
    name: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    row = BY_NAME[name]
    older = copy_of(directory_of(row), tmp_path)
    (older / "config.json").write_text(json.dumps(version4.CONFIGS[name]))
    kind = AutoModel if row.family == "bert" else AutoModelForCausalLM
    theirs = kind.from_pretrained(older, attn_implementation=row.attention)
    assert (_logits(older) - measure.expected(theirs, TOKENS)).abs().max() <= measure.LOGIT_BAR


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_old_names_of_longrope(
    kind: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    """What Phi-3 called its two lists before transformers 4.43; the newest refuses to read it."""
    newer = directory_of(BY_NAME["phi3, short and long factors"])
    older = copy_of(newer, tmp_path)
    fields = version4.CONFIGS["phi3, short and long factors"]
    scaling = dict(fields["rope_scaling"]) | {"type": kind}  # type: ignore[call-overload]
    (older / "config.json").write_text(json.dumps(fields | {"rope_scaling": scaling}))
    assert read_config(older).replace(name="") == read_config(newer).replace(name="")


# --- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FIRST)
def test_shards_of_any_family_equal_a_single_file(
    family: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    row = FIRST[family]
    kind = AutoModel if family == "bert" else AutoModelForCausalLM
    single = directory_of(row)
    theirs = kind.from_pretrained(single)
    sharded = checkpoints.save(theirs, tmp_path, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(_logits(sharded), _logits(single))


@pytest.mark.parametrize("family", FIRST)
def test_weights_of_half_precision_are_the_rounded_ones(
    family: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    whole = directory_of(FIRST[family])
    half = edit_weights(
        whole, tmp_path, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()}
    )
    model, exact = load_model(half), load_model(whole)
    assert model.dtype == torch.float32
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float()), name


@pytest.mark.parametrize("family", FIRST)
def test_tied_and_untied_embeddings(
    family: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    """A head beside tied embeddings is passed over; an untied one is needed."""
    path = directory_of(FIRST[family])
    config = read_config(path)
    if family in ("bert", "phi", "gptj"):  # have no head, or one with a bias of its own
        return
    head = FAMILIES[family].names(config).model["lm_head"].names[0] + ".weight"
    width = config.embedding_size or config.hidden_size
    zeros = torch.zeros(config.vocab_size, width)
    other = edit_weights(path, tmp_path, lambda tensors: tensors | {head: zeros.clone()})
    edit_json(other / "config.json", tie_word_embeddings=False)
    assert not _logits(other).any(), "the head is what projects"
    edit_json(other / "config.json", tie_word_embeddings=True)
    assert _logits(other).any()
    if config.tie_word_embeddings:
        assert torch.equal(_logits(other), _logits(path))
        edit_json(path / "config.json", tie_word_embeddings=False)
        assert_refused(path, f"missing {head}")
        edit_json(path / "config.json", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("gpt_bigcode", "transformer."),
        ("falcon", "transformer."),
        ("bloom", "transformer."),
        ("mpt", "transformer."),
        ("opt", "model."),
    ],
)
def test_some_exporters_leave_the_prefix_out(
    family: str, prefix: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    def strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert all(name.startswith(prefix) for name in tensors)
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    path = directory_of(FIRST[family])
    assert torch.equal(_logits(edit_weights(path, tmp_path, strip)), _logits(path))


def test_bert_with_its_old_names_and_what_stands_on_top(
    tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    def rewrite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {
            "bert."
            + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in tensors.items()
        }
        assert sum("gamma" in name for name in renamed) == 5
        return renamed | {
            "cls.predictions.bias": torch.zeros(259),
            "cls.seq_relationship.weight": torch.zeros(2, 64),
            "bert.embeddings.position_ids": torch.arange(64)[None],
        }

    path = directory_of(FIRST["bert"])
    assert any("pooler" in name for name in load_file(path / "model.safetensors"))
    assert torch.equal(_logits(edit_weights(path, tmp_path, rewrite)), _logits(path))


# --- damage ------------------------------------------------------------------------------------


def _fused(path: Path) -> str:
    """A tensor that several of ours are cut from, or else the first."""
    names = sorted(load_file(path / "model.safetensors"))
    return next((n for n in names if "qkv" in n or "query_key" in n or "c_attn" in n), names[0])


@pytest.mark.parametrize("family", FIRST)
def test_damaged_tensors_of_any_family_are_named(
    family: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    path = directory_of(FIRST[family])
    stored = _fused(path)
    name = stored.removeprefix(FAMILIES[family].prefix)
    for index, (edit, problem) in enumerate(_damage(stored)):
        broken = edit_weights(path, _fresh(tmp_path, index), edit)
        assert_refused(broken, problem.format(name=name))


def _damage(
    stored: str,
) -> list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]]:
    return [
        (lambda t: {n: x for n, x in t.items() if n != stored}, "missing {name}"),
        (lambda t: t | {"surplus.weight": torch.zeros(1)}, "unexpected surplus.weight"),
        (lambda t: t | {stored: t[stored][:-1].clone()}, "{name} has shape"),
        (lambda t: t | {stored: t[stored][None].clone()}, "{name} has shape"),
        (lambda t: t | {stored: t[stored].double()}, "{name} has dtype F64"),
        (lambda t: t | {stored: t[stored].int()}, "{name} has dtype I32"),
    ]


@pytest.mark.parametrize("family", FIRST)
def test_a_file_that_ends_early_is_named(
    family: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    broken = copy_of(directory_of(FIRST[family]), tmp_path)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert_refused(broken, f"{file} is not a readable safetensors file")


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt_oss", "bert"])
@pytest.mark.parametrize("lie", ["shape", "dtype", "offsets", "hole"])
def test_a_header_that_lies_is_refused(
    family: str, lie: str, tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    broken = copy_of(directory_of(FIRST[family]), tmp_path)
    file = broken / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    first, second = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    if lie == "shape":
        first["shape"] = [2 * first["shape"][0], *first["shape"][1:]]
    elif lie == "dtype":
        first["dtype"] = "F16"
    elif lie == "offsets":
        first["data_offsets"] = [n + len(content) for n in first["data_offsets"]]
    else:
        second["data_offsets"] = [n + 4 for n in second["data_offsets"]]
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
    assert_refused(broken, f"{file} is not a readable safetensors file")


def test_a_tensor_that_is_stored_twice_is_refused(
    tmp_path: Path, directory_of: Callable[[Row], Path]
) -> None:
    falcon = directory_of(FIRST["falcon"])
    broken = edit_weights(
        falcon,
        _fresh(tmp_path, 0),
        lambda t: t | {"ln_f.weight": t["transformer.ln_f.weight"].clone()},
    )
    assert_refused(broken, "ln_f.weight is stored twice")
    sharded = copy_of(directory_of(FIRST["llama"]), _fresh(tmp_path, 1))
    shutil.copy(sharded / "model.safetensors", sharded / "again.safetensors")
    tensors = load_file(sharded / "again.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, sharded / "again.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "again.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(sharded, "model.norm.weight is stored twice", "again.safetensors")


def test_swapped_layouts_of_one_shape_are_told_apart_by_the_configuration(
    directory_of: Callable[[Row], Path], tmp_path: Path
) -> None:
    """Both keep [192, 64] for queries, keys and values, in another order of rows."""
    grouped = directory_of(BY_NAME["gpt_bigcode, multi-head"])
    assert check_checkpoint(grouped).layers[0].num_kv_heads == 4
    broken = copy_of(grouped, tmp_path)
    edit_json(broken / "config.json", multi_query=True)
    assert_refused(broken, "h.0.attn.c_attn.weight has shape [192, 64]", "needs [96, 64]")


def _fresh(tmp_path: Path, index: int) -> Path:
    directory = tmp_path / str(index)
    directory.mkdir()
    return directory


def _logits(path: Path) -> Tensor:
    return measure.actual(load_model(path), TOKENS)
