"""Twice the sustainable load, on a small scale."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import typer

from loadtests import saturation
from loadtests.stages import Stage
from loadtests.summary import summarize, summarize_stage
from tests.loadtests.conftest import MAX_WAITING, RealServer
from tests.loadtests.test_summary import SAMPLES

pytestmark = pytest.mark.alone


@pytest.mark.slow
def test_beyond_saturation_the_service_refuses_goes_on_and_recovers(
    real_server: RealServer, tmp_path: Path
) -> None:
    with contextlib.suppress(typer.Exit):  # a busy machine may fail what is about speed
        saturation.main(
            target=real_server.target,
            max_waiting=MAX_WAITING,
            prompt="uniform:8-24",
            output="uniform:8-24",
            ramp_seconds=6,
            overload_seconds=5,
            results=tmp_path,
        )
    document = json.loads((tmp_path / "saturation.json").read_text())
    bounded, refused, goodput, idle, probe = document["checks"]
    assert bounded["passed"], bounded
    assert refused["passed"], refused
    assert idle["passed"], idle
    assert document["overload"]["failures"].keys() == {"RESOURCE_EXHAUSTED"}
    assert document["overloaded"]["output_tokens_per_s"] > (
        0.5 * document["sustained"]["output_tokens_per_s"]
    )
    table = (tmp_path / "saturation.md").read_text()
    for check in (bounded, refused, goodput, idle, probe):
        assert f"| {check['name']} | {check['found']} |" in table


@pytest.fixture(scope="module")
def found() -> saturation.Saturation:
    whole = summarize(SAMPLES, client_cpu=0.1, began=99.0)
    best = summarize_stage(SAMPLES, Stage(0.0, 5.0, 8.0), began=99.0)
    return saturation.Saturation(
        server="tiny",
        sustained=best,
        ramp=whole,
        overload=whole,
        overloaded=best,
        max_waiting=4,
        recovery_seconds=3.0,
        idle=whole,
        probe=whole,
    )


def test_all_checks_pass_where_they_should(found: saturation.Saturation) -> None:
    assert all(check.passed for check in found.checks(max_waiting=4))
    assert not found.client_bound


@pytest.mark.parametrize(
    ("fields", "failing"),
    [
        ({"max_waiting": 5}, 0),
        ({"rejects_with_retry_info": 0}, 1),
        ({"failures": {"RESOURCE_EXHAUSTED": 1, "UNAVAILABLE": 1}}, 1),
        ({"failures": {}, "rejects_with_retry_info": 0}, 1),
        ({"output_tokens_per_s": 0.5}, 2),
        ({"recovery_seconds": 10.5}, 3),
        ({"ttft_ms": None}, 4),
    ],
)
def test_each_check_can_fail(
    found: saturation.Saturation, fields: dict[str, object], failing: int
) -> None:
    name = next(iter(fields))
    part = {"output_tokens_per_s": "overloaded", "ttft_ms": "probe"}.get(name, "overload")
    if name in ("max_waiting", "recovery_seconds"):
        worse = dataclasses.replace(found, **fields)  # type: ignore[arg-type]
    else:
        changed = dataclasses.replace(getattr(found, part), **fields)
        worse = dataclasses.replace(found, **{part: changed})
    checks = worse.checks(max_waiting=4)
    assert [number for number, check in enumerate(checks) if not check.passed] == [failing]


def test_a_load_that_was_sent_late_is_not_counted(found: saturation.Saturation) -> None:
    late = dataclasses.replace(found.overload, delay_ms=found.overload.e2e_ms)
    assert not dataclasses.replace(found, overload=late).client_bound
    slower = dataclasses.replace(found.overload.e2e_ms, p99=1500.0)  # type: ignore[type-var]
    late = dataclasses.replace(found.overload, delay_ms=slower)
    assert dataclasses.replace(found, overload=late).client_bound
