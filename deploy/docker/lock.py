"""Locks what goes into the image: `make image-locks`.

Versions are those of requirements.lock, which the tests run with; pip says which file of each it
takes for this Python and machine, and only that file may be installed. Run it with Debian's
version of Python, 3.11, on Linux x86-64.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Run while an image is built, and not part of it.
_TOOLS = ["cyclonedx-bom==7.5.0", "pip-licenses==5.5.5"]


def lock(requirements: Sequence[str], pins: Sequence[str], environment: Mapping[str, str]) -> str:
    """One line for each package that pip would install into an empty environment.

    Raises:
        subprocess.CalledProcessError: pip finds no set of packages that keeps to the pins.
    """
    with tempfile.TemporaryDirectory() as directory:
        constraints, report = Path(directory) / "constraints.txt", Path(directory) / "report.json"
        constraints.write_text("\n".join(pins))
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"),
                *("--ignore-installed", "--only-binary", ":all:", "--report", str(report)),
                *("--constraint", str(constraints), *requirements),
            ],
            check=True,
            env={**os.environ, **environment},
        )
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = sorted(
        f"{package['metadata']['name']}=={package['metadata']['version']} "
        f"--hash=sha256:{package['download_info']['archive_info']['hashes']['sha256']}\n"
        for package in packages
    )
    return "# Written by `make image-locks`.\n" + "".join(lines)


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    # setup.py is run by setuptools of the environment, which has the headers of torch.
    serving = [*project["dependencies"], "setuptools"]
    loads = [*serving, *project["optional-dependencies"]["loadtests"]]
    # The CPU build of torch has a version of its own, so that no other can be taken for it. The
    # CUDA build is the plain one of the public index, and says itself which Triton it works with.
    cpu = [f"{pin}+cpu" if pin.startswith("torch==") else pin for pin in pins]
    cuda = [pin for pin in pins if not pin.startswith("triton==")]
    plans: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
        "cpu": (serving, cpu, {}),
        "loadtests": (loads, cpu, {}),
        "cuda": (serving, cuda, {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}),
        "tools": (_TOOLS, [], {}),
    }
    for name in sys.argv[1:] or plans:
        (HERE / f"{name}.lock").write_text(lock(*plans[name]), encoding="utf-8")


if __name__ == "__main__":
    main()
