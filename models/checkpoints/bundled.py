"""Checkpoints that come with the package."""

from pathlib import Path

_DEMO = Path(__file__).resolve().parent.parent / "demo"
BUNDLED_MODELS = {
    "demo": _DEMO / "mha",
    "demo-gqa": _DEMO / "gqa",
    "demo-mqa": _DEMO / "mqa",
    "demo-pruned": _DEMO / "pruned",
}


def checkpoint_directory(model: str | Path) -> Path:
    """Where a model lies that is named by its directory, or is bundled and has a name."""
    return BUNDLED_MODELS.get(str(model), Path(model))


def model_name(directory: Path) -> str:
    """By which a bundled model is asked for; of others, the name of the directory."""
    resolved = directory.resolve()
    names = (name for name, path in BUNDLED_MODELS.items() if path == resolved)
    return next(names, resolved.name)
