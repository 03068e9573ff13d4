"""What a load may be, and how it travels to locust."""

import math
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from loadtests.load import LoadSpec
from loadtests.options import add_options, from_options, to_options
from loadtests.workload import SHAREGPT_OUTPUT, SHAREGPT_PROMPT, Lengths, Workload

WORKLOAD = Workload(Lengths.parse("fixed:8"), Lengths.parse("fixed:8"))


class Parser(ArgumentParser):
    """As locust's: knows whether an option is shown."""

    def add_argument(self, *names: Any, include_in_web_ui: bool = True, **rest: Any) -> Any:
        return super().add_argument(*names, **rest)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"users": 0}, "users is 0"),
        ({"users": 10**9}, "users is 1000000000"),
        ({"users": 1, "processes": 2}, "one for each process"),
        ({"processes": 0}, "processes is 0"),
        ({"rate": 0}, "rate is 0"),
        ({"rate": -1.5}, "rate is -1.5"),
        ({"rate": math.nan}, "rate is nan"),
        ({"num_requests": 0}, "num_requests is 0"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"timeout": 0}, "timeout is 0"),
        ({"token_file": "/no/file"}, "token_file is /no/file; allowed: a file that can be read"),
        ({"tls_ca": "/no/file"}, "tls_ca is /no/file"),
        ({"tls_client_key": "/no/file"}, "tls_client_key is /no/file"),
        (
            {"tls_ca": __file__, "tls_client_cert": __file__},
            f"tls_client_cert is {__file__}; allowed: a file",
        ),
        (
            {"tls_client_cert": __file__, "tls_client_key": __file__},
            "with tls_client_key and tls_ca",
        ),
        ({"shape": "wave"}, "shape is 'wave'"),
        ({"shape": "ramp", "num_requests": 5}, "shape is 'ramp'; allowed: steady, unless seconds"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        LoadSpec("127.0.0.1:9000", WORKLOAD, **{"users": 4, **fields})
    assert message in str(caught.value)


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        LoadSpec("", WORKLOAD, users=0, rate=-1, seconds=-1)
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "users",
        "rate",
        "seconds",
    ]


@pytest.mark.parametrize(
    "spec",
    [
        LoadSpec("127.0.0.1:9000", WORKLOAD, users=3, num_requests=7),
        LoadSpec(
            "[::1]:9000",
            Workload(
                SHAREGPT_PROMPT,
                Lengths.parse("uniform:1-3"),
                shared_prefix=9,
                hang_up=0.25,
                seed=11,
            ),
            users=40,
            application="mqa",
            rate=0.125,
            seconds=2.5,
            shape="spike",
            processes=2,
            timeout=30.0,
            token_file=Path(__file__),
            tls_ca=Path(__file__).with_name("conftest.py"),
            tls_client_cert=Path(__file__).with_name("test_run.py"),
            tls_client_key=Path(__file__).with_name("test_feed.py"),
        ),
    ],
)
def test_locust_gets_the_load_that_was_asked_for(spec: LoadSpec) -> None:
    options = _parser().parse_args(to_options(spec))
    assert from_options(options, target=options.host) == spec


def test_locust_knows_sharegpt_by_its_name() -> None:
    options = _parser().parse_args(["--prompt=sharegpt", "--output=sharegpt"])
    workload = from_options(options, target="").workload
    assert (workload.prompt, workload.output) == (SHAREGPT_PROMPT, SHAREGPT_OUTPUT)


def _parser() -> Parser:
    parser = Parser()
    add_options(parser)
    parser.add_argument("--host")
    parser.add_argument("--users", type=int, dest="num_users")
    parser.add_argument("--spawn-rate", type=float)
    parser.add_argument("--processes", type=int)
    return parser
