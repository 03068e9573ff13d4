"""From a section of a sweep file to the models that it describes."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtests.sweep.source import Place, Source
from loadtests.sweep.spec import Checkpoint, Shape
from models.checkpoints.bundled import checkpoint_directory
from models.checkpoints.loader import check_checkpoint
from models.config import ITEMSIZE, ModelConfig
from models.errors import ConfigError, ModelError
from models.tokenizer import Tokenizer
from models.transformer import Transformer
from service.bench import BenchShape

# Widths are multiples of it: a vector of 32-bit numbers, and what matrix units like.
_VECTOR = 16
# Ways to say the same: the field of a model, and the key of the file.
_KEYS = {
    "num_heads": "heads",
    "num_kv_heads": "kv_heads",
    "rotary_dim": "head_dim",
    "hidden_size": "hidden",
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """One model that is measured.

    Attributes:
        checkpoint: its directory, or `demo`; None is written for the sweep, with random weights.
        arm: `checkpoint`, `same shape` or `same parameters`: what the configurations have in
            common beside their heads.
        place: where the file describes it.
    """

    name: str
    model: ModelConfig
    num_parameters: int
    checkpoint: Path | None
    arm: str
    place: Place

    @property
    def directory(self) -> Path | None:
        """Where its checkpoint is; None if it is written for the sweep."""
        return None if self.checkpoint is None else checkpoint_directory(self.checkpoint)

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * ITEMSIZE[self.model.dtype]

    def to_dict(self) -> dict[str, Any]:
        """What a report says about it."""
        heads = self.model.layers[0]
        return {
            "name": self.name,
            "arm": self.arm,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "heads": self.model.head_label,
            "attention": "+".join(dict.fromkeys(layer.kind for layer in self.model.layers)),
            "num_heads": heads.num_heads,
            "num_kv_heads": heads.num_kv_heads,
            "head_dim": heads.head_dim,
            "window": heads.window,
            "layers": self.model.num_layers,
            "hidden": self.model.hidden_size,
            "intermediate": self.model.intermediate_size,
            "vocab": self.model.vocab_size,
            "dtype": self.model.dtype,
            "parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.model.kv_bytes_per_token(),
        }


def expand(shape: Shape, place: Place, source: Source, max_len: int) -> Iterator[Configuration]:
    """The configurations of every combination that can work; the others are mistakes."""
    for heads, window in itertools.product(shape.heads, shape.window):
        if shape.head_dim is None and shape.hidden % heads:
            allowed = f"a divisor of hidden={shape.hidden} where head_dim is not given"
            source.refuse((*place, "heads"), f"is {heads}; allowed: {allowed}")
            continue
        head_dims = shape.head_dim or [shape.hidden // heads]
        for kv_heads, head_dim in itertools.product(shape.kv_heads or [heads], head_dims):
            bench = BenchShape(
                shape.layers, shape.hidden, shape.intermediate, heads, kv_heads, head_dim,
                shape.vocab, shape.dtype, window,
            )  # fmt: skip
            try:
                model = bench.model_config(max_len)
            except ConfigError as error:
                key = _KEYS.get(error.field, error.field)
                text = str(error).removeprefix(error.field).strip()
                source.refuse((*place, key), text.replace("num_heads=", "heads="))
                continue
            yield _configuration(shape, model, place)


def _configuration(shape: Shape, model: ModelConfig, place: Place) -> Configuration:
    widened = shape.same_parameters_as is not None
    if shape.name is None:
        name = f"{model.head_label}-widened" if widened else model.head_label
    else:
        is_one = shape.num_combinations == 1
        name = shape.name if is_one else f"{shape.name}-{model.head_label}"
    arm = "same parameters" if widened else "same shape"
    return Configuration(name, model, count_parameters(model), None, arm, place)


def widen(configuration: Configuration, num_parameters: int) -> Configuration:
    """The same heads with an `intermediate_size` that brings it to so many parameters, up to the
    rounding to whole vectors: nobody would build a model of other widths, which compute slower."""
    model = configuration.model
    one_more = model.replace(intermediate_size=model.intermediate_size + 1)
    each = count_parameters(one_more) - configuration.num_parameters
    columns = model.intermediate_size + (num_parameters - configuration.num_parameters) / each
    vectors = max(round(columns / _VECTOR), 1)
    wide = model.replace(intermediate_size=vectors * _VECTOR)
    return dataclasses.replace(configuration, model=wide, num_parameters=count_parameters(wide))


def read_checkpoint(section: Checkpoint, place: Place, source: Source) -> Configuration | None:
    """A checkpoint that can be served; None, and a mistake, if it cannot."""
    try:
        model = check_checkpoint(checkpoint_directory(section.checkpoint))
        Tokenizer.for_model(checkpoint_directory(section.checkpoint), model)
    except (ModelError, OSError) as error:
        source.refuse((*place, "checkpoint"), f"is {str(section.checkpoint)!r}: {error}")
        return None
    if not model.is_causal:
        source.refuse((*place, "checkpoint"), f"is {str(section.checkpoint)!r}, an encoder")
        return None
    return Configuration(
        section.name, model, count_parameters(model), section.checkpoint, "checkpoint", place
    )


def count_parameters(model: ModelConfig) -> int:
    """Parameters of a model, none of which is allocated."""
    with torch.device("meta"):
        return Transformer(model).num_parameters


def same_parameters(
    configurations: list[Configuration], references: Mapping[str, str], source: Source
) -> list[Configuration]:
    """The configurations, those widened that `references` names with another one."""
    by_name = {configuration.name: configuration for configuration in configurations}
    result: list[Configuration] = []
    for configuration in configurations:
        reference = references.get(configuration.name)
        if reference is None:
            result.append(configuration)
        elif reference not in by_name or reference in references:
            plain = ", ".join(name for name in by_name if name not in references)
            allowed = plain or "the name of a configuration without it"
            place = (*configuration.place, "same_parameters_as")
            source.refuse(place, f"is {reference!r}; allowed: {allowed}")
        else:
            result.append(widen(configuration, by_name[reference].num_parameters))
    return result
