"""Under what a sweep is measured: its runs can be compared while none of it changes."""

import hashlib
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loadtests.sweep.plan import Plan
from service.bench import machine

_PACKAGES = ("headroom", "torch", "ray", "grpcio", "locust")
_MODEL_FILES = {".json", ".safetensors"}


def conditions(plan: Plan) -> dict[str, dict[str, Any]]:
    """`machine`, `versions`, `checkpoints` and `text` as sweep.json keeps them, of here and now.

    Random weights follow from the plan; of other checkpoints the content is hashed, and so is the
    text that they are measured on.
    """
    checkpoints = {
        one.name: fingerprint(one.directory)
        for one in plan.configurations
        if one.directory is not None
    }
    return {
        "machine": machine(torch.device("cpu"))
        | {"threads": plan.engine.num_threads, "platform": platform.platform()},
        "versions": {name: version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "checkpoints": checkpoints,
        "text": plan.text.describe() if checkpoints else {},
    }


def differences(stored: dict[str, Any], now: dict[str, dict[str, Any]]) -> list[str]:
    """What would make new runs differ from the stored ones, one text each.

    Args:
        stored: a document; what it does not say, as older ones do not, is not compared.
    """
    compared = {"machine": ("cpu", "threads")} | {
        name: tuple(now[name]) for name in ("versions", "checkpoints", "text")
    }
    return [
        f"{section}.{name} was {before!r}, is {now[section][name]!r}"
        for section, names in compared.items()
        for name in names
        if (before := stored.get(section, {}).get(name)) not in (None, now[section][name])
    ]


def fingerprint(directory: Path) -> str:
    """SHA-256 of the configuration, the weights and the tokenizer in a checkpoint."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in _MODEL_FILES:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name} {digest}\n".encode())
    return total.hexdigest()


def commit() -> str | None:
    """The commit of the code that runs, where it is a git checkout; `+` marks changes on top."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parents[2]

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [git, "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )

    head = ask("rev-parse", "HEAD")
    if head.returncode:
        return None
    # A sweep writes results while it runs; they are no change of the code.
    changes = ask("status", "--porcelain", "--", ":/", ":(top,exclude)loadtests/results")
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
