"""A local page in a real browser that reaches no network."""

import os
import subprocess
from pathlib import Path

from tests.tools import tool

_DOCTYPE = "<!doctype html>"
# The browser logs what scripts say and throw, but not which files could not be had.
_HOOK = """<script>
addEventListener("error", e => e.message || console.error("missing", e.target.outerHTML), true)
</script>"""


def open_page(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts have run, and every line of its console."""
    hooked = page.with_name("hooked.html")
    hooked.write_text(page.read_text().replace(_DOCTYPE, _DOCTYPE + _HOOK, 1))
    flags = [
        "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000",
        "--enable-logging=stderr", "--v=0", "--window-size=1400,2000",
        f"--user-data-dir={profile}", "--dump-dom",
    ]  # fmt: skip
    # A browser that runs as root refuses its own sandbox; the page is our own.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    answer = subprocess.run(
        [tool("chromium"), *flags, *sandbox, hooked.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return answer.stdout, [line for line in answer.stderr.splitlines() if ":CONSOLE" in line]
