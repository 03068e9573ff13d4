"""A LoadSpec as command-line options of locust, and back."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtests.load import LoadSpec
from loadtests.stages import SHAPES
from loadtests.workload import Workload

DEFAULT_TARGET = "127.0.0.1:9000"
# Of options that mean "no limit"; locust's web page knows no empty numbers.
_OFF = 0
# Fields of the spec that name files; an empty option is none.
_FILES = {
    "token_file": "File that holds the bearer token; else the variable HEADROOM_TOKEN.",
    "tls_ca": "Certificates (PEM) of who vouches for the server; it is TLS then.",
    "tls_client_cert": "The clients' certificate (PEM), for mTLS.",
    "tls_client_key": "Its key (PEM).",
}


def add_options(parser: ArgumentParser) -> None:
    """Add what locust's own `--host`, `--users` and `--processes` do not say.

    Args:
        parser: locust's, which also takes whether its web page shows an option.
    """
    add: Callable[..., Any] = parser.add_argument
    add("--application", default="headroom", help="Application, if the server has several.")
    add("--prompt", default="fixed:128", help="Lengths of prompts, as uniform:64-256 or sharegpt.")
    add("--output", default="fixed:128", help="Lengths of outputs.")
    add("--shared-prefix", type=int, default=0, help="Equal tokens in front of every prompt.")
    add("--hang-up", type=float, default=0.0, help="Share of requests that the client leaves.")
    add("--seed", type=int, default=0, help="Of prompts, lengths and arrivals.")
    add("--rate", type=float, default=float(_OFF), help="Requests/s, open loop; 0: closed loop.")
    add("--requests", type=int, default=_OFF, help="So many in all; 0: no limit.")
    add("--seconds", type=float, default=float(_OFF), help="So long; 0: no limit.")
    add(
        "--shape", default="steady", choices=SHAPES, help="Of the load over the seconds.",
        include_in_web_ui=False,
    )  # fmt: skip
    for field, text in _FILES.items():
        add(f"--{field.replace('_', '-')}", default="", help=text, include_in_web_ui=False)
    add("--timeout", type=float, default=600.0, help="Seconds until a client gives up.")
    add(
        "--samples", default="", help="File for one line per request, gzip JSON lines.",
        include_in_web_ui=False,
    )  # fmt: skip


def to_options(spec: LoadSpec) -> list[str]:
    """The options that `from_options` reads."""
    workload = spec.workload
    values = {
        "host": spec.target,
        "users": spec.users,
        "spawn-rate": spec.users,
        "application": spec.application,
        "prompt": workload.prompt,
        "output": workload.output,
        "shared-prefix": workload.shared_prefix,
        "hang-up": workload.hang_up,
        "seed": workload.seed,
        "rate": spec.rate or _OFF,
        "requests": spec.num_requests or _OFF,
        "seconds": spec.seconds or _OFF,
        "shape": spec.shape,
        "timeout": spec.timeout,
        **{field.replace("_", "-"): getattr(spec, field) or "" for field in _FILES},
    }
    processes = [f"--processes={spec.processes}"] if spec.processes > 1 else []
    return [f"--{name}={value}" for name, value in values.items()] + processes


def from_options(options: Namespace, *, target: str) -> LoadSpec:
    """Raises ValueError, with one line for each option that is wrong."""
    return LoadSpec(
        target=target,
        application=options.application,
        workload=Workload.parse(
            options.prompt,
            options.output,
            shared_prefix=options.shared_prefix,
            hang_up=options.hang_up,
            seed=options.seed,
        ),
        users=options.num_users or 1,
        rate=options.rate or None,
        num_requests=options.requests or None,
        seconds=options.seconds or None,
        shape=options.shape,
        processes=options.processes or 1,
        timeout=options.timeout,
        **{field: Path(value) for field in _FILES if (value := getattr(options, field))},
    )
