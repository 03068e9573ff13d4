"""How long a decode step takes, from the bytes it has to read, fitted to measured steps.

    step = a + c * weight bytes + e * key/value bytes

`a` is what every step costs (scheduling, launching), `1 / c` and `1 / e` are the bandwidths that
weights and the cache are read with. The model holds where reading is what takes the time; see
`service.capacity.bounds` for where it is not.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

# Columns that agree to so many digits cannot be told apart by measured times.
_RANK_TOLERANCE = 1e-4


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
    """

    weight_bytes: float
    kv_bytes: float
    seconds: float
    group: str


@dataclass(frozen=True, slots=True)
class StepModel:
    """A fitted step time.

    Attributes:
        a: seconds of every step. Where `c` is None, it includes the reading of the weights.
        c: seconds per weight byte; None where all samples have the same weights, which do not
            tell a constant from the time of reading them.
        e: seconds per key/value byte.
        r2: share of the variance of the measured times that the model explains.
        error: largest difference from a sample, as a share of its time.
        slopes: `e` of each group, fitted on its own samples with an intercept of its own; groups
            whose samples all read the same bytes have none.
        weight_bytes, kv_bytes: least and most among the samples; beyond is extrapolation.
    """

    a: float
    c: float | None
    e: float
    r2: float
    error: float
    slopes: dict[str, float]
    weight_bytes: tuple[float, float]
    kv_bytes: tuple[float, float]

    def predict(self, weight_bytes: float, kv_bytes: float) -> float:
        """Seconds of a decode step.

        Raises:
            ValueError: the samples had other weights and do not say what these cost.
        """
        if self.c is None:
            fitted = self.weight_bytes[0]
            if not math.isclose(weight_bytes, fitted, rel_tol=_RANK_TOLERANCE):
                raise ValueError(
                    f"weight_bytes is {weight_bytes:.0f}; the step model was fitted for "
                    f"{fitted:.0f} only"
                )
            return self.a + self.e * kv_bytes
        return self.a + self.c * weight_bytes + self.e * kv_bytes

    @property
    def slope_spread(self) -> float:
        """How far the groups' slopes are apart: the largest over the smallest, less 1; 0 for fewer
        than two groups, infinite if one does not rise."""
        if len(self.slopes) < 2:
            return 0.0
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
        slopes = fields.get("slopes")
        if not isinstance(slopes, Mapping):
            raise ValueError(f"slopes is {slopes!r}; allowed: an object of numbers")
        return StepModel(
            a=_number(fields, "a"),
            c=None if fields.get("c") is None and "c" in fields else _number(fields, "c"),
            e=_number(fields, "e"),
            r2=_number(fields, "r2", least=-math.inf),
            error=_number(fields, "error"),
            slopes={str(group): _number(slopes, group, least=-math.inf) for group in slopes},
            weight_bytes=_range(fields, "weight_bytes"),
            kv_bytes=_range(fields, "kv_bytes"),
        )


def fit_step_model(samples: Sequence[StepSample]) -> StepModel:
    """The step model with the least squared relative error whose coefficients are not negative.

    Errors are relative because the noise of a measured time grows with it.

    Raises:
        UndeterminedFitError: fewer than three samples, or all read the same key/value bytes, or
            the key/value bytes follow from the weight bytes.
        ValueError: a sample is not a finite number above 0 (key/value bytes: 0 or more).
    """
    for sample in samples:
        _check(sample)
    if len(samples) < 3:
        raise UndeterminedFitError(f"{len(samples)} samples; at least 3 are needed")
    weights, cached, seconds = (
        np.array([getattr(sample, field) for sample in samples], dtype=np.float64)
        for field in ("weight_bytes", "kv_bytes", "seconds")
    )
    if _alike(cached):
        raise UndeterminedFitError(
            "all samples read the same key/value bytes; vary the users or the lengths"
        )
    same_weights = _alike(weights)
    columns = [np.ones_like(weights), *([] if same_weights else [weights]), cached]
    matrix = np.stack(columns, axis=1)
    if not same_weights and _rank(matrix) < 3:
        raise UndeterminedFitError(
            "the key/value bytes of the samples follow from their weight bytes; vary the users or "
            "the lengths within a configuration"
        )
    fitted = _non_negative_least_squares(matrix, seconds)
    residuals = matrix @ fitted - seconds
    variance = float(((seconds - seconds.mean()) ** 2).sum())
    return StepModel(
        a=float(fitted[0]),
        c=None if same_weights else float(fitted[1]),
        e=float(fitted[-1]),
        r2=1 - float((residuals**2).sum()) / variance if variance else 0.0,
        error=float(np.abs(residuals / seconds).max()),
        slopes=_slopes(samples),
        weight_bytes=(float(weights.min()), float(weights.max())),
        kv_bytes=(float(cached.min()), float(cached.max())),
    )


def _non_negative_least_squares(matrix: Matrix, seconds: Matrix) -> Matrix:
    """Coefficients, none below 0, with the least squared relative error.

    The best non-negative fit is the plain fit of those columns that it uses, so with three
    columns every choice of them is tried.
    """
    num_columns = matrix.shape[1]
    best, best_error = np.zeros(num_columns), math.inf
    for size in range(1, num_columns + 1):
        for used in map(list, itertools.combinations(range(num_columns), size)):
            candidate = np.zeros(num_columns)
            candidate[used] = _least_squares(matrix[:, used], seconds)
            error = float((((matrix @ candidate - seconds) / seconds) ** 2).sum())
            if (candidate >= 0).all() and error < best_error:
                best, best_error = candidate, error
    return best


def _slopes(samples: Sequence[StepSample]) -> dict[str, float]:
    slopes: dict[str, float] = {}
    for group in dict.fromkeys(sample.group for sample in samples):
        own = [sample for sample in samples if sample.group == group]
        cached = np.array([sample.kv_bytes for sample in own], dtype=np.float64)
        if not _alike(cached):
            matrix = np.stack([np.ones_like(cached), cached], axis=1)
            seconds = np.array([sample.seconds for sample in own])
            slopes[group] = float(_least_squares(matrix, seconds)[1])
    return slopes


def _least_squares(matrix: Matrix, seconds: Matrix) -> Matrix:
    """Coefficients with the least squared relative error; columns of bytes and of ones differ by
    ten orders of magnitude, so they are brought to one scale first."""
    relative = matrix / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1
    solution = np.linalg.lstsq(relative / scale, np.ones_like(seconds))[0]
    return np.asarray(solution / scale, dtype=np.float64)


def _rank(matrix: Matrix) -> int:
    """Columns that are not combinations of the others."""
    centred = matrix[:, 1:] - matrix[:, 1:].mean(axis=0)
    scaled = centred / np.linalg.norm(centred, axis=0)
    return 1 + int(np.linalg.matrix_rank(scaled, tol=_RANK_TOLERANCE))


def _alike(values: Matrix) -> bool:
    return bool(np.ptp(values) <= _RANK_TOLERANCE * np.abs(values).max())


def _check(sample: StepSample) -> None:
    for field in ("weight_bytes", "seconds"):
        value = getattr(sample, field)
        if not 0 < value < math.inf:
            raise ValueError(f"{field} of a sample is {value!r}; allowed: above 0, finite")
    if not 0 <= sample.kv_bytes < math.inf:
        raise ValueError(f"kv_bytes of a sample is {sample.kv_bytes!r}; allowed: 0 or more, finite")


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


def _range(fields: Mapping[str, Any], name: str) -> tuple[float, float]:
    value = fields.get(name)
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}; allowed: two numbers, the least and the most")
    least, most = (_number({name: number}, name) for number in value)
    return least, most
