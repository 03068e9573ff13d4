"""Which checkpoint tensors make up each of our parameters.

Our parameters and their shapes are known from the model itself; a family only says what its
checkpoints call them, and how a tensor that fuses several of ours is laid out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import HeadConfig, ModelConfig
from models.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint's form of one of our modules or parameters.

    Attributes:
        names: its tensors, which joined along their rows make up ours; without `.weight` or
            `.bias` where ours is a module. `{head}` stands for each head: one tensor per head.
        transposed: matrices are stored as `[in, out]` (GPT-2).
        grouped: one tensor fuses queries, keys and values group by group: the query heads that
            share a key/value head, then its key, then its value.
    """

    names: tuple[str, ...]
    transposed: bool = False
    grouped: bool = False


def source(*names: str, transposed: bool = False, grouped: bool = False) -> Source:
    return Source(names, transposed, grouped)


@dataclass(frozen=True, slots=True)
class NameMap:
    """The names of one family.

    Attributes:
        model: our modules outside of the layers.
        layer: our modules within a layer; their names follow `layer_prefix`.
        layer_prefix: with `{layer}` for the number.
    """

    model: Mapping[str, Source]
    layer: Mapping[str, Source]
    layer_prefix: str


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor, which is some of the rows of one of our parameters.

    Attributes:
        shape: in the checkpoint.
        row_order: row `i` of ours is row `row_order[i]` of theirs; None keeps their order.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    row_order: Tensor | None = None

    def to_ours(self, theirs: Tensor) -> Tensor:
        rows = theirs.T if self.transposed else theirs
        return rows if self.row_order is None else rows[self.row_order]

    def to_theirs(self, ours: Tensor) -> Tensor:
        rows = ours if self.row_order is None else ours[self.row_order.argsort()]
        return rows.T if self.transposed else rows


def find_pieces(config: ModelConfig, names: NameMap) -> dict[str, tuple[Piece, ...]]:
    """The checkpoint tensors of each of our parameters, in the order of their rows."""
    with torch.device("meta"):
        parameters = dict(Transformer(config).named_parameters())
    return {
        name: _pieces(name, tuple(parameter.shape), config, names)
        for name, parameter in parameters.items()
    }


def _pieces(
    name: str, shape: tuple[int, ...], config: ModelConfig, names: NameMap
) -> tuple[Piece, ...]:
    heads: HeadConfig | None = None
    prefix, table, local = "", names.model, name
    if name.startswith("layers."):
        _, index, local = name.split(".", 2)
        heads = config.layers[int(index)]
        prefix, table = names.layer_prefix.format(layer=index), names.layer
    module, _, kind = local.rpartition(".")
    if module.endswith((".reduce", ".expand")):  # of a projection with a rank; only we write them
        return (Piece(f"{prefix}{local}", shape),)
    suffix = "" if local in table else f".{kind}"
    found = table[local if local in table else module]
    stems = found.names
    if heads is not None and "{head}" in stems[0]:
        stems = tuple(stems[0].format(head=head) for head in range(shape[0]))
        return tuple(Piece(f"{prefix}{stem}{suffix}", shape[1:]) for stem in stems)
    transposed = found.transposed and len(shape) == 2
    row_order = None
    if found.grouped:
        assert heads is not None, "only attention fuses heads"
        row_order = _grouped_rows(heads)
    pieces: list[Piece] = []
    for stem, rows in zip(stems, _split_rows(local, shape[0], len(stems), heads), strict=True):
        part = (rows, *shape[1:])
        stored = part[::-1] if transposed else part
        pieces.append(Piece(f"{prefix}{stem}{suffix}", stored, transposed, row_order))
    return tuple(pieces)


def _split_rows(local: str, rows: int, parts: int, heads: HeadConfig | None) -> list[int]:
    """Rows of each tensor that a parameter of ours joins."""
    if parts == 1:
        return [rows]
    if local.startswith("attention.qkv"):
        assert heads is not None, "attention belongs to a layer"
        kv_rows = heads.num_kv_heads * heads.head_dim
        return [heads.num_heads * heads.head_dim, kv_rows, kv_rows]
    return [rows // parts] * parts


def _grouped_rows(heads: HeadConfig) -> Tensor:
    """Where our rows (all queries, all keys, all values) are in a tensor fused by groups."""
    size = heads.num_queries_per_kv
    rows = torch.arange((heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim)
    groups = rows.view(heads.num_kv_heads, size + 2, heads.head_dim)
    query, key, value = groups[:, :size], groups[:, size], groups[:, size + 1]
    return torch.cat([part.flatten() for part in (query, key, value)])
