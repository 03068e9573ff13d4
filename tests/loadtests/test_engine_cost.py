"""What a step costs beside the model: told apart into parts, from a run that is really served."""

import json
from pathlib import Path

import pytest

from loadtests import engine_cost
from service.engine.scheduler import Scheduler

OWN = ("planning", "batch", "results", "recording", "statistics", "handing out")


def test_a_short_run_writes_what_the_long_one_does(tmp_path: Path) -> None:
    schedule = Scheduler.schedule
    engine_cost.main(sequences=3, steps=9, layers=1, kv_heads=4, results=tmp_path)
    assert Scheduler.schedule is schedule, "nothing stays timed"
    document = json.loads((tmp_path / "engine-cost.json").read_text())
    for times in (document["computed_ms"], document["passed_ms"]):
        assert list(times) == [*OWN, "all", "model", "text"]
        assert all(0 < ms < 1000 for ms in times.values())
        assert times["all"] < times["model"]
    # Three prompts may come in up to three steps; every later step decodes all.
    assert 6 <= document["steps"] <= 9
    table = (tmp_path / "engine-cost.md").read_text()
    all_ms = (document["computed_ms"]["all"], document["passed_ms"]["all"])
    assert f"| all | | {all_ms[0]:.3f} | {all_ms[1]:.3f} |" in table
    assert document["machine"]["torch"] in table


def test_what_is_not_the_models_is_the_engines_own() -> None:
    seconds = {
        "step": 10.0,
        "planning": 0.1,
        "batch": 0.2,
        "forms": 0.4,  # inside of the model's
        "model": 8.4,
        "recording": 0.3,
        "statistics": 0.5,
        "handing out": 0.7,  # after the step
        "text": 5.0,  # on another thread
    }
    parts = engine_cost.own_parts(seconds)
    assert parts["model"] == pytest.approx(8000)
    assert parts["batch"] == pytest.approx(600)
    assert parts["all"] == pytest.approx(2700)
    assert sum(parts[name] for name in OWN) == pytest.approx(parts["all"])
