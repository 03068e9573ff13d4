"""The step model: recovers what made the samples, is optimal, and refuses to guess."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.capacity import StepModel, StepSample, UndeterminedFitError, fit_step_model

MHA, GQA, MQA = 219_059_712, 200_185_344, 193_107_456
KV_PER_TOKEN = {MHA: 36_864, GQA: 12_288, MQA: 3_072}
A, C, E, F = 0.002, 1 / 30e9, 1 / 20e9, 1 / 150e9


def _samples(noise: float = 0.0) -> list[StepSample]:
    """Three head configurations under four loads each, with times that follow the byte model."""
    factors = np.random.default_rng(1).uniform(1 - noise, 1 + noise, 12)
    return [
        StepSample(weights, kv, (A + C * weights + E * kv) * factor, f"kv{KV_PER_TOKEN[weights]}")
        for (weights, kv), factor in zip(
            [(w, k * tokens) for w, k in KV_PER_TOKEN.items() for tokens in (500, 2e3, 8e3, 3e4)],
            factors,
            strict=True,
        )
    ]


def test_it_recovers_the_coefficients_that_made_the_samples() -> None:
    model = fit_step_model(_samples())
    assert (model.a, model.c, model.e) == pytest.approx((A, C, E), rel=1e-6)
    assert model.slopes == pytest.approx(dict.fromkeys(("kv36864", "kv12288", "kv3072"), E))
    assert model.r2 == pytest.approx(1)
    assert model.error < 1e-9
    assert model.slope_spread == pytest.approx(0, abs=1e-6)
    assert model.predict(GQA, 1e9, 0) == pytest.approx(A + C * GQA + E * 1e9)


def _computing(weights: tuple[int, ...] = (MHA, GQA, MQA)) -> list[StepSample]:
    """Steps of 1 to 64 sequences at two lengths, whose arithmetic takes time too."""
    samples = []
    for w in weights:
        for sequences, tokens in itertools.product((1, 8, 32, 64), (192, 1056)):
            kv = KV_PER_TOKEN[w] * tokens * sequences
            flops = w * sequences + KV_PER_TOKEN[MHA] * tokens * sequences
            seconds = A + C * w + E * kv + F * flops
            samples.append(StepSample(w, kv, seconds, f"kv{KV_PER_TOKEN[w]}", flops))
    return samples


def test_arithmetic_is_told_from_reading() -> None:
    """Without its own coefficient, the slopes take what arithmetic costs and disagree."""
    model = fit_step_model(_computing())
    assert (model.a, model.c, model.e, model.f) == pytest.approx((A, C, E, F), rel=1e-6)
    assert model.slopes == pytest.approx(dict.fromkeys(("kv36864", "kv12288", "kv3072"), E))
    seconds = A + C * GQA + E * 1e9 + F * 1e10
    assert model.predict(GQA, 1e9, 1e10) == pytest.approx(seconds)
    bytes_alone = fit_step_model([dataclasses.replace(s, flops=0.0) for s in _computing()])
    assert (bytes_alone.f, bytes_alone.flops) == (0, (0, 0))
    assert bytes_alone.r2 < 0.9 < model.r2
    assert bytes_alone.slope_spread is not None
    assert bytes_alone.slope_spread > 1


def test_operations_that_follow_from_the_bytes_are_part_of_them() -> None:
    """One model at one length: each sequence adds the same bytes and the same operations."""
    samples = [
        StepSample(MHA, 1e7 * n, 0.01 + 0.001 * n, "kv36864", MHA * n) for n in (1, 2, 8, 32)
    ]
    model = fit_step_model(samples)
    assert model.f == 0
    assert model.e == pytest.approx(1e-10)


def test_noise_of_three_percent_stays_three_percent() -> None:
    model = fit_step_model(_samples(noise=0.03))
    assert model.error < 0.06
    assert 0.99 < model.r2 < 1
    for sample in _samples():
        assert model.predict(sample.weight_bytes, sample.kv_bytes, 0) == pytest.approx(
            sample.seconds, rel=0.03
        )


def test_standard_errors_are_how_far_slopes_scatter() -> None:
    """Of many noisy measurements of the same steps."""
    rng = np.random.default_rng(0)
    models = [
        fit_step_model(
            [
                dataclasses.replace(sample, seconds=sample.seconds * rng.normal(1, 0.02))
                for sample in _samples()
            ]
        )
        for _ in range(300)
    ]
    for group in ("kv36864", "kv12288", "kv3072"):
        scatter = np.std([model.slopes[group] for model in models])
        said = np.sqrt(np.mean([model.slope_errors[group] ** 2 for model in models]))
        assert said == pytest.approx(scatter, rel=0.2), group
    assert all(error < 1e-6 * E for error in fit_step_model(_samples()).slope_errors.values())
    four = fit_step_model([_samples()[index] for index in (0, 1, 4, 5)])
    assert len(four.slopes) == 2
    assert four.slope_errors == {}, "no sample to spare"


def test_a_configuration_that_reads_slower_has_its_own_slope() -> None:
    slow = [
        StepSample(s.weight_bytes, s.kv_bytes, s.seconds + E * s.kv_bytes, s.group)
        if s.group == "kv3072"
        else s
        for s in _samples()
    ]
    model = fit_step_model(slow)
    assert model.slopes["kv3072"] == pytest.approx(2 * E)
    assert model.slopes["kv36864"] == pytest.approx(E)
    assert model.slope_spread == pytest.approx(1)


def test_one_weight_leaves_its_cost_unknown() -> None:
    model = fit_step_model(_samples()[:4])
    assert model.c is None
    assert model.a == pytest.approx(A + C * MHA), "a constant and the weights cannot be told apart"
    assert model.predict(MHA, 1e9, 0) == pytest.approx(A + C * MHA + E * 1e9)
    with pytest.raises(ValueError, match="fitted for 219059712 only"):
        model.predict(GQA, 1e9, 0)


def test_weights_that_a_bounded_fit_leaves_untold_are_not_free() -> None:
    """Larger weights that take less time, as noise makes them: no slope of theirs is above 0."""
    falling = [
        dataclasses.replace(sample, seconds=A - C * sample.weight_bytes / 10 + E * sample.kv_bytes)
        for sample in _samples()
    ]
    model = fit_step_model(falling)
    assert model.c == 0
    assert model.predict(1.09 * MHA, 1e9, 0) == model.predict(MQA, 1e9, 0)
    for weights in (1.11 * MHA, 0.89 * MQA):
        with pytest.raises(ValueError, match=r"does not tell what weights cost.* 193107456 to 219"):
            model.predict(weights, 1e9, 0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (_samples()[:2], "2 samples; at least 3"),
        ([], "0 samples"),
        ([StepSample(w, w / 3, w, "x") for w in KV_PER_TOKEN], "follow from their weight bytes"),
        ([StepSample(1e8 * i, 1e6, 0.01 * i, "x") for i in (1, 2, 3)], "the same key/value bytes"),
    ],
    ids=["two", "none", "one load for each", "the same load"],
)
def test_what_samples_do_not_say_is_not_guessed(samples: list[StepSample], message: str) -> None:
    with pytest.raises(UndeterminedFitError, match=message):
        fit_step_model(samples)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1e6, 1e9), st.floats(0, 1e9), st.floats(1e-3, 1.0), st.floats(0, 1e11)),
        min_size=3,
        max_size=12,
    )
)
def test_no_other_coefficients_fit_better(rows: list[tuple[float, float, float, float]]) -> None:
    """The conditions of Karush, Kuhn and Tucker: where a coefficient is positive, the error's
    gradient is 0; where it is 0, the error grows with it."""
    try:
        model = fit_step_model([StepSample(*row[:3], group="x", flops=row[3]) for row in rows])
    except UndeterminedFitError:
        return
    array = np.array(rows)
    columns = {"a": np.ones(len(rows)), "e": array[:, 1]}
    if model.c is not None:
        columns["c"] = array[:, 0]
    if model.f:
        columns["f"] = array[:, 3]
    scaled = np.stack(list(columns.values()), axis=1) / array[:, 2:3]
    fitted = np.array([getattr(model, name) for name in columns])
    assert (fitted >= 0).all()
    gradient = scaled.T @ (scaled @ fitted - 1) / np.abs(scaled).sum(axis=0)
    assert (gradient > -1e-6).all()
    assert np.abs(gradient[fitted > 0]).max(initial=0) < 1e-6


def test_json_and_back() -> None:
    model = fit_step_model(_samples(noise=0.01))
    assert StepModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    computing = fit_step_model(_computing())
    assert StepModel.from_dict(json.loads(json.dumps(computing.to_dict()))) == computing
    one = fit_step_model(_samples()[:4])
    assert StepModel.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("a", -1, "a is -1; allowed"),
        ("e", math.nan, "e is nan"),
        ("e", None, "e is None"),
        ("c", "fast", "c is 'fast'"),
        ("f", -1, "f is -1"),
        ("flops", [1], "flops is .*two numbers"),
        ("slopes", [1], "slopes is"),
        ("slopes", {"x": math.inf}, "x is inf"),
        ("kv_bytes", [1], "kv_bytes is .*two numbers"),
        ("error", True, "error is True"),
    ],
)
def test_a_damaged_model_is_refused_by_its_field(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepModel.from_dict(fit_step_model(_samples()).to_dict() | {field: value})


@pytest.mark.parametrize(
    "sample",
    [
        StepSample(1e8, 1e6, 0.0, "x"),
        StepSample(0, 1e6, 0.1, "x"),
        StepSample(1e8, -1, 0.1, "x"),
        StepSample(1e8, 1e6, math.nan, "x"),
        StepSample(1e8, 1e6, 0.1, "x", -1),
    ],
)
def test_impossible_samples_are_refused(sample: StepSample) -> None:
    with pytest.raises(ValueError, match="of a sample is"):
        fit_step_model([*_samples(), sample])
