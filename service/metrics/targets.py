"""A file that tells Prometheus where to scrape."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_targets(path: Path, applications: Mapping[str, Sequence[str]]) -> None:
    """Write the addresses of each application's replicas, for Prometheus' `file_sd_configs`.

    Prometheus may read at any time, so the file appears whole.

    Args:
        applications: HOST:PORT of each replica, by application.

    Raises:
        OSError: the file cannot be written.
    """
    groups = [
        {"targets": list(targets), "labels": {"application": application}}
        for application, targets in applications.items()
    ]
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(groups, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
