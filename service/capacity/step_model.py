"""How long a decode step takes, from what it reads and computes, fitted to measured steps.

    step = a + c * weight bytes + e * key/value bytes + f * operations

`a` is what every step costs (scheduling, launching), `1 / c` and `1 / e` are the bandwidths that
weights and the cache are read with, `1 / f` is the rate of arithmetic. With `f` = 0 it is the byte
model, which holds where reading is what takes the time; `service.capacity.step_time` names the
parts of a step for which it is not.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Matrix: TypeAlias = npt.NDArray[np.float64]
Slopes: TypeAlias = dict[str, float]

# Columns that agree to so many digits cannot be told apart by measured times.
_RANK_TOLERANCE = 1e-4
# Where the fit does not tell what weights cost, they may be the whole step: weights that are so
# much more or fewer change it by no more than that.
_UNTOLD_WEIGHTS = 0.1


class UndeterminedFitError(ValueError):
    """The samples do not say how long a step of other bytes would take."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """Decode steps of one configuration under one load, on average.

    Attributes:
        weight_bytes: of the whole model.
        kv_bytes: keys and values that a step reads.
        seconds: of a step.
        group: samples that share a slope, for example a head label.
        flops: multiplications and additions of a step; 0 in all samples fits bytes alone.
    """

    weight_bytes: float
    kv_bytes: float
    seconds: float
    group: str
    flops: float = 0.0


@dataclass(frozen=True, slots=True)
class StepModel:
    """A fitted step time.

    Attributes:
        a: seconds of every step. Where `c` is None, it includes the reading of the weights.
        c: seconds per weight byte; None where all samples have the same weights, which do not
            tell a constant from the time of reading them. 0 is where the fit is bounded: it does
            not tell either, and `a` has what the weights cost.
        e: seconds per key/value byte.
        f: seconds per operation; 0 where the samples do not tell operations from bytes.
        r2: share of the variance of the measured times that the model explains.
        error: largest difference from a sample, as a share of its time.
        slopes: `e` of each group, where `a`, `c` and `f` are fitted anew for all together; groups
            whose samples all read the same bytes have none.
        weight_bytes, kv_bytes, flops: least and most among the samples; beyond is extrapolation.
        slope_errors: standard error of each slope, from the scatter of the samples about their fit;
            none where there are no more samples than coefficients.
    """

    a: float
    c: float | None
    e: float
    r2: float
    error: float
    slopes: Slopes
    weight_bytes: tuple[float, float]
    kv_bytes: tuple[float, float]
    f: float = 0.0
    flops: tuple[float, float] = (0.0, 0.0)
    slope_errors: Slopes = field(default_factory=dict)

    def predict(self, weight_bytes: float, kv_bytes: float, flops: float) -> float:
        """Seconds of a decode step.

        Raises:
            ValueError: the samples had other weights and do not say what these cost.
        """
        least, most = self.weight_bytes
        if self.c == 0 and not (
            (1 - _UNTOLD_WEIGHTS) * least <= weight_bytes <= (1 + _UNTOLD_WEIGHTS) * most
        ):
            raise ValueError(
                f"weight_bytes is {weight_bytes:.0f}; the step model does not tell what weights "
                f"cost, and was fitted for {least:.0f} to {most:.0f}"
            )
        if self.c is None:
            fitted = self.weight_bytes[0]
            if not math.isclose(weight_bytes, fitted, rel_tol=_RANK_TOLERANCE):
                raise ValueError(
                    f"weight_bytes is {weight_bytes:.0f}; the step model was fitted for "
                    f"{fitted:.0f} only"
                )
            weight_bytes = 0.0
        return self.a + (self.c or 0.0) * weight_bytes + self.e * kv_bytes + self.f * flops

    @property
    def slope_spread(self) -> float | None:
        """How far the groups' slopes are apart: the largest over the smallest, less 1; infinite if
        one does not rise, None for fewer than two groups."""
        if len(self.slopes) < 2:
            return None
        least = min(self.slopes.values())
        return max(self.slopes.values()) / least - 1 if least > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "StepModel":
        """The opposite of `to_dict`.

        Raises:
            ValueError: a field is missing or not what `to_dict` writes.
        """
        return StepModel(
            a=_number(fields, "a"),
            c=None if fields.get("c") is None and "c" in fields else _number(fields, "c"),
            e=_number(fields, "e"),
            r2=_number(fields, "r2", least=-math.inf),
            error=_number(fields, "error"),
            slopes=_by_group(fields, "slopes"),
            weight_bytes=_range(fields, "weight_bytes"),
            kv_bytes=_range(fields, "kv_bytes"),
            f=_number(fields, "f") if "f" in fields else 0.0,
            flops=_range(fields, "flops") if "flops" in fields else (0.0, 0.0),
            slope_errors=_by_group(fields, "slope_errors") if "slope_errors" in fields else {},
        )


def fit_step_model(samples: Sequence[StepSample]) -> StepModel:
    """The step model with the least squared relative error whose coefficients are not negative.

    Errors are relative because the noise of a measured time grows with it.

    Raises:
        UndeterminedFitError: fewer than three samples, or all read the same key/value bytes, or
            the key/value bytes follow from the weight bytes.
        ValueError: a sample is not a finite number above 0 (key/value bytes, operations: 0 or
            more).
    """
    for sample in samples:
        _check(sample)
    if len(samples) < 3:
        raise UndeterminedFitError(f"{len(samples)} samples; at least 3 are needed")
    weights, cached, flops, seconds = (
        np.array([getattr(sample, name) for sample in samples], dtype=np.float64)
        for name in ("weight_bytes", "kv_bytes", "flops", "seconds")
    )
    if _alike(cached):
        raise UndeterminedFitError(
            "all samples read the same key/value bytes; vary the users or the lengths"
        )
    columns = {"a": np.ones_like(weights), "c": weights, "e": cached, "f": flops}
    if _alike(weights):
        del columns["c"]
    elif not _independent(weights, cached):
        raise UndeterminedFitError(
            "the key/value bytes of the samples follow from their weight bytes; vary the users or "
            "the lengths within a configuration"
        )
    known = [column for name, column in columns.items() if name in ("c", "e")]
    if len(samples) <= len(known) + 1 or _alike(flops) or not _independent(*known, flops):
        del columns["f"]
    matrix = np.stack(list(columns.values()), axis=1)
    fitted = _non_negative_least_squares(matrix, seconds)
    residuals = matrix @ fitted - seconds
    variance = float(((seconds - seconds.mean()) ** 2).sum())
    coefficients = dict(zip(columns, map(float, fitted), strict=True))
    slopes, slope_errors = _slopes(samples, columns, seconds)
    return StepModel(
        a=coefficients["a"],
        c=coefficients.get("c"),
        e=coefficients["e"],
        f=coefficients.get("f", 0.0),
        r2=1 - float((residuals**2).sum()) / variance if variance else 0.0,
        error=float(np.abs(residuals / seconds).max()),
        slopes=slopes,
        slope_errors=slope_errors,
        weight_bytes=(float(weights.min()), float(weights.max())),
        kv_bytes=(float(cached.min()), float(cached.max())),
        flops=(float(flops.min()), float(flops.max())),
    )


def _non_negative_least_squares(matrix: Matrix, seconds: Matrix, num_free: int = 0) -> Matrix:
    """Coefficients with the least squared relative error, none below 0 but the first `num_free`.

    The best non-negative fit is the plain fit of those columns that it uses, so with four
    columns every choice of them is tried.
    """
    num_columns = matrix.shape[1]
    free, bounded = range(num_free), range(num_free, num_columns)
    best, best_error = np.zeros(num_columns), math.inf
    for size in range(len(bounded) + 1):
        for chosen in itertools.combinations(bounded, size):
            used = [*free, *chosen]
            candidate = np.zeros(num_columns)
            candidate[used] = _least_squares(matrix[:, used], seconds)
            error = float((((matrix @ candidate - seconds) / seconds) ** 2).sum())
            if (candidate[num_free:] >= 0).all() and error < best_error:
                best, best_error = candidate, error
    return best


def _slopes(
    samples: Sequence[StepSample], columns: dict[str, Matrix], seconds: Matrix
) -> tuple[Slopes, Slopes]:
    """A slope for each group, the other columns in common, and the standard error of each."""
    names = np.array([sample.group for sample in samples])
    own = {group: columns["e"] * (names == group) for group in dict.fromkeys(names.tolist())}
    common = [column for name, column in columns.items() if name != "e"]
    if len(samples) < len(own) + len(common):
        return {}, {}
    matrix = np.stack([*own.values(), *common], axis=1)
    fitted = _non_negative_least_squares(matrix, seconds, num_free=len(own))
    told = [not _alike(columns["e"][names == group]) for group in own]
    slopes = dict(itertools.compress(zip(own, map(float, fitted), strict=False), told))
    errors = _standard_errors(matrix, seconds, fitted)
    if errors is None:
        return slopes, {}
    return slopes, dict(itertools.compress(zip(own, map(float, errors), strict=False), told))


def _standard_errors(matrix: Matrix, seconds: Matrix, fitted: Matrix) -> Matrix | None:
    """Of the coefficients of a fit, those that are not 0; None without a sample to spare."""
    used = fitted != 0
    spare = len(seconds) - int(used.sum())
    if spare < 1:
        return None
    relative = matrix[:, used] / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    variance = float(((matrix @ fitted / seconds - 1) ** 2).sum()) / spare
    scaled = relative / scale
    errors = np.zeros(len(fitted))
    errors[used] = np.sqrt(variance * np.diag(np.linalg.pinv(scaled.T @ scaled))) / scale
    return errors


def _least_squares(matrix: Matrix, seconds: Matrix) -> Matrix:
    """Coefficients with the least squared relative error; columns of bytes and of ones differ by
    ten orders of magnitude, so they are brought to one scale first."""
    relative = matrix / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1
    solution = np.linalg.lstsq(relative / scale, np.ones_like(seconds))[0]
    return np.asarray(solution / scale, dtype=np.float64)


def _independent(*columns: Matrix) -> bool:
    """Whether none of the columns follows from the others and a constant."""
    matrix = np.stack(columns, axis=1)
    centred = matrix - matrix.mean(axis=0)
    scaled = centred / np.linalg.norm(centred, axis=0)
    return int(np.linalg.matrix_rank(scaled, tol=_RANK_TOLERANCE)) == len(columns)


def _alike(values: Matrix) -> bool:
    return bool(np.ptp(values) <= _RANK_TOLERANCE * np.abs(values).max())


def _check(sample: StepSample) -> None:
    for name in ("weight_bytes", "seconds"):
        value = getattr(sample, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} of a sample is {value!r}; allowed: above 0, finite")
    for name in ("kv_bytes", "flops"):
        value = getattr(sample, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} of a sample is {value!r}; allowed: 0 or more, finite")


def _number(fields: Mapping[str, Any], name: str, *, least: float = 0.0) -> float:
    value = fields.get(name)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not max(least, -sys.float_info.max) <= value <= sys.float_info.max
    ):
        allowed = "a finite number" if least else "a finite number, 0 or more"
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
    return float(value)


def _by_group(fields: Mapping[str, Any], name: str) -> Slopes:
    values = fields.get(name)
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} is {values!r}; allowed: an object of numbers")
    return {str(group): _number(values, group, least=-math.inf) for group in values}


def _range(fields: Mapping[str, Any], name: str) -> tuple[float, float]:
    value = fields.get(name)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; allowed: two numbers, the least and the most")
    least, most = (_number({name: number}, name) for number in value)
    return least, most
