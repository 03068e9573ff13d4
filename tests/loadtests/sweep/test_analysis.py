"""The analysis finds again what made up runs were made from."""

import copy
import json
from typing import Any

import pytest

from loadtests.sweep.analysis import analyse
from tests.loadtests.sweep.documents import (
    SWEEP,
    A,
    C,
    E,
    F,
    kv_bytes,
    measured,
    plan,
    step_seconds,
)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return analyse(plan(), measured(plan()))


def test_the_fit_finds_the_coefficients(document: dict[str, Any]) -> None:
    fit = document["step_model"]
    assert [fit[name] for name in "acef"] == pytest.approx([A, C, E, F], rel=1e-6)
    assert fit["r2"] == pytest.approx(1)
    assert fit["slopes"] == pytest.approx(dict.fromkeys(("h4kv4d16", "h4kv2d16", "h4kv1d16"), E))


def test_both_fits_say_whether_they_reach_what_is_asked(document: dict[str, Any]) -> None:
    whole, by_bytes = document["fits"]
    assert whole["step_model"] == document["step_model"]
    assert (whole["points"], whole["r2_met"], whole["slopes_met"]) == (12, True, True)
    assert whole["slope_spread"] == pytest.approx(0, abs=1e-6)
    unbound = [p for p in document["points"] if not p["decode"]["arithmetic_bound"]]
    assert (by_bytes["points"], by_bytes["step_model"]["f"]) == (len(unbound), 0)
    assert 0 < len(unbound) < 12


def test_what_is_asked_and_not_reached_is_said() -> None:
    """One configuration reads twice as slowly, and one load takes twice as long."""
    document = measured(plan())
    for run in document["runs"]:
        cached = run["server"]["decode_kv_bytes"]
        if run["configuration"] == "h4kv1d16":
            run["server"]["decode_seconds"] += 20 * E * cached
        if run["load"].startswith("c4-p16-"):
            run["server"]["decode_seconds"] *= 2
    whole = analyse(plan(), document)["fits"][0]
    assert (whole["r2_met"], whole["slopes_met"]) == (False, False)
    assert whole["step_model"]["r2"] < 0.95


def test_a_plan_of_an_unseen_configuration_knows_its_own_sequences(
    document: dict[str, Any],
) -> None:
    """The loads are steady, so a planner that never saw the configuration is right; mean keys and
    values of a request differ from those in the middle of it by half a token."""
    for point in document["points"]:
        planned = point["decode"]["planned"]
        assert planned["sequences"] == point["clients"]
        assert planned["kv_bytes"] == pytest.approx(point["decode"]["kv_bytes"], rel=0.03)
        assert planned["off"] == pytest.approx(0, abs=0.02)
    json.dumps(document, allow_nan=False)


def test_a_plan_does_not_learn_from_what_it_predicts() -> None:
    """A configuration that is ten times slower than any other misses its own plan, and spoils
    that of the others."""
    document = measured(plan())
    honest = analyse(plan(), copy.deepcopy(document))
    for run in document["runs"]:
        if run["configuration"] == "h4kv2d16":
            run["server"]["decode_seconds"] *= 10
    changed = analyse(plan(), document)
    for before, after in zip(honest["points"], changed["points"], strict=True):
        same = before["decode"]["planned"]["step_s"] == after["decode"]["planned"]["step_s"]
        assert same == (before["configuration"] == "h4kv2d16")
        if same:
            assert after["decode"]["planned"]["off"] == pytest.approx(-0.9, abs=0.01)


def test_a_plan_needs_other_configurations() -> None:
    text = SWEEP.replace("kv_heads: [4, 2, 1]", "kv_heads: [4]")
    document = analyse(plan(text), measured(plan(text)))
    assert [point["decode"]["planned"] for point in document["points"]] == [None] * 4
    assert document["fits"][0]["slopes_met"] is None


def test_runs_that_are_not_counted_change_nothing_and_are_named(document: dict[str, Any]) -> None:
    for point in document["points"]:
        load = next(load for load in plan().loads if load.name == point["load"])
        seconds = step_seconds(plan(), point["configuration"], load)
        assert point["output_tokens_per_s"] == pytest.approx(load.clients / seconds)
        assert (point["runs"], point["counted"]) == (3, 2)
        assert point["not_counted"] == ["the load generator was busy (0.95 of a core)"]
        assert point["decode"]["prediction_off"] == pytest.approx(0, abs=1e-6)


def test_ratios_are_against_the_first_configuration(document: dict[str, Any]) -> None:
    sweep = plan()
    weights = {one.name: one.weight_bytes for one in sweep.configurations}
    assert len(document["ratios"]) == 2 * len(sweep.loads)
    for row in document["ratios"]:
        load = next(load for load in sweep.loads if load.name == row["load"])
        times = [step_seconds(sweep, name, load) for name in ("h4kv4d16", row["configuration"])]
        read = [
            weights[name] + kv_bytes(sweep, name, load)
            for name in ("h4kv4d16", row["configuration"])
        ]
        assert row["decode"] == row["throughput"] == pytest.approx(times[0] / times[1])
        assert row["fit"] == pytest.approx(times[0] / times[1])
        assert row["bytes"] == pytest.approx(read[0] / read[1])
        assert row["bytes_off"] == pytest.approx(row["bytes"] / row["decode"] - 1)


def test_a_part_that_computes_longer_than_it_reads_is_named(document: dict[str, Any]) -> None:
    """The made up machine computes 1.5 operations in the time of a byte; a float32 weight takes
    half an operation per byte and sequence, a float32 key as many as query heads share it."""
    for point in document["points"]:
        expected = ["weights"] * (point["clients"] / 2 > 1.5) + ["cache"] * (
            {"h4kv4d16": 1, "h4kv2d16": 2, "h4kv1d16": 4}[point["configuration"]] / 2 > 1.5
        )
        assert point["decode"]["arithmetic_bound"] == expected


def test_a_fit_that_the_loads_do_not_determine_is_none_with_a_reason() -> None:
    text = """\
engine: {kv_cache_bytes: 1MiB}
configurations: [{layers: 1, hidden: 16, intermediate: 16, vocab: 300, heads: 2}]
loads: [{clients: 1, prompt: 16, output: 8}]
"""
    document = analyse(plan(text), measured(plan(text)))
    assert document["step_model"] is None
    assert "1 samples; at least 3 are needed" in document["step_model_reason"]
    assert document["ratios"] == []


def test_a_plan_that_misses_for_want_of_sequences_says_so() -> None:
    """Steps of the largest load hold one sequence of four, as where prompts are long: a plan of
    four is far off, one of one is not; and arithmetic, which binds four, is not to blame."""
    document = measured(plan())
    for run in document["runs"]:
        if not run["load"].startswith("c4-p128-"):
            continue
        alone = next(
            other["server"]
            for other in document["runs"]
            if (other["configuration"], other["repeat"]) == (run["configuration"], run["repeat"])
            and other["load"].startswith("c1-p128-")
        )
        run["server"] |= {name: alone[name] for name in alone if name.startswith("decode_")}
    for point in analyse(plan(), document)["points"]:
        planned = point["decode"]["planned"]
        if point["load"].startswith("c4-p128-"):
            assert (planned["sequences"], point["decode"]["sequences"]) == (4, 1)
            assert planned["off"] > 0.2
            assert planned["held_off"] == pytest.approx(0, abs=0.02)
            assert planned["cause"] == "fewer sequences than clients"
        else:
            assert planned["held_off"] == planned["off"] == pytest.approx(0, abs=0.02)
            assert planned["cause"] is None
