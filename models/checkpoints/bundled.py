"""Checkpoints that come with the package."""

from pathlib import Path

_DEMO = Path(__file__).parent.parent / "demo"
BUNDLED_MODELS = {"demo": _DEMO / "mha", "demo-gqa": _DEMO / "gqa", "demo-mqa": _DEMO / "mqa"}


def checkpoint_directory(model: str | Path) -> Path:
    """Where a model lies that is named by its directory, or is bundled and has a name."""
    return BUNDLED_MODELS.get(str(model), Path(model))
