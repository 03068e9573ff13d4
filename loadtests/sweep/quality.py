"""What a checkpoint's model card says of its quality, in the form of the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import yaml

_CARDS = ("README.md", "MODEL_CARD.md")
_METRIC = "bits_per_byte"
_MAX_BYTES = 1024 * 1024


def read_quality(directory: Path) -> dict[str, Any] | None:
    """`bits_per_byte` and the name of the data it was measured on, from `model-index` in the
    front matter of the card; None if the card does not say it."""
    for name in _CARDS:
        for result in _results(directory / name):
            for metric in _list(result.get("metrics")):
                value = metric.get("value")
                if metric.get("type") == _METRIC and isinstance(value, int | float):
                    dataset = result.get("dataset")
                    named = dataset.get("name") if isinstance(dataset, dict) else None
                    return {_METRIC: float(value), "dataset": str(named), "card": name}
    return None


def _results(card: Path) -> list[dict[str, Any]]:
    try:
        with card.open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
    except (OSError, UnicodeDecodeError):
        return []
    if not text.startswith("---\n"):
        return []
    try:
        fields = yaml.safe_load(text[4:].partition("\n---\n")[0])
    except yaml.YAMLError:
        return []
    index = _list(fields.get("model-index") if isinstance(fields, dict) else None)
    return [result for model in index for result in _list(model.get("results"))]


def _list(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
