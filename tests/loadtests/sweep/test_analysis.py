"""The analysis finds again what made up runs were made from."""

from typing import Any

import pytest

from loadtests.sweep.analysis import analyse
from tests.loadtests.sweep.documents import A, C, E, kv_bytes, measured, plan, step_seconds


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return analyse(plan(), measured(plan()))


def test_the_fit_finds_the_coefficients(document: dict[str, Any]) -> None:
    fit = document["step_model"]
    assert [fit["a"], fit["c"], fit["e"]] == pytest.approx([A, C, E], rel=1e-6)
    assert fit["r2"] == pytest.approx(1)
    assert fit["slopes"] == pytest.approx(dict.fromkeys(("h4kv4d16", "h4kv2d16", "h4kv1d16"), E))


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
    """The made up machine computes 3 operations in the time of a byte; a float32 weight takes
    half an operation per byte and sequence, a float32 key as many as query heads share it."""
    for point in document["points"]:
        expected = ["weights"] * (point["clients"] / 2 > 3) + ["cache"] * (
            {"h4kv4d16": 1, "h4kv2d16": 2, "h4kv1d16": 4}[point["configuration"]] / 2 > 3
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
