"""One compact figure of a sweep as a picture, for pages that cannot run a report.

python -m loadtests.sweep.picture loadtests/results/kv-heads
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from loadtests.sweep.report import write_picture_page
from service.console import fail, out

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SIZE = "1200,510"


def main(
    directory: Annotated[Path, typer.Argument(help="Folder of a finished sweep.")],
) -> None:
    """Write throughput.png into the folder of a sweep."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        fail(f"none of {', '.join(_BROWSERS)} is on PATH; the picture needs one")
    try:
        document = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{directory} holds no sweep: {error}", code=2)
    if "points" not in document:
        fail(f"the sweep in {directory} is not finished", code=2)
    picture = directory / "throughput.png"
    with tempfile.TemporaryDirectory() as work:
        page = Path(work) / "throughput.html"
        write_picture_page(document, page)
        photograph(browser, page, picture)
    out.print(f"{picture}")


def photograph(browser: str, page: Path, picture: Path) -> None:
    """Save what a browser shows of a local page, twice as fine as a plain screen."""
    # A browser that runs as root refuses its own sandbox; the page is our own.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    flags = [
        "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--force-device-scale-factor=2", f"--window-size={_SIZE}", "--virtual-time-budget=5000",
        f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture.resolve()}",
    ]  # fmt: skip
    subprocess.run(
        [browser, *sandbox, *flags, page.as_uri()], check=True, capture_output=True, timeout=60
    )


if __name__ == "__main__":
    typer.run(main)
