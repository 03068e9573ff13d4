"""What a head configuration needs and what it gives: blocks, concurrency, step time. Numbers only,
no transport."""

from service.capacity.changes import Change, Target, find_changes
from service.capacity.machine import MachineLimits, measure_machine
from service.capacity.plan import CapacityPlan, plan_capacity, weight_bytes
from service.capacity.query import CapacityQuery
from service.capacity.residency import RequestShape
from service.capacity.step_model import (
    StepModel,
    StepSample,
    UndeterminedFitError,
    fit_step_model,
)
from service.capacity.step_time import DecodeStep, StepTime

__all__ = [
    "CapacityPlan",
    "CapacityQuery",
    "Change",
    "DecodeStep",
    "MachineLimits",
    "RequestShape",
    "StepModel",
    "StepSample",
    "StepTime",
    "Target",
    "UndeterminedFitError",
    "find_changes",
    "fit_step_model",
    "measure_machine",
    "plan_capacity",
    "weight_bytes",
]
