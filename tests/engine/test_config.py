"""Limits of an engine: every one has a lower bound, and a refusal names the field."""

import dataclasses

import pytest

from service.engine.config import EngineConfig

REQUIRED = (
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_waiting_requests",
    "max_waiting_tokens",
)
OPTIONAL = ("num_blocks", "kv_cache_bytes", "max_model_len", "num_threads")


def build(**changes: int | None) -> EngineConfig:
    """One sequence at a time, so that no field depends on another."""
    return dataclasses.replace(EngineConfig(max_num_seqs=1), **changes)  # type: ignore[arg-type]


def test_every_number_is_checked() -> None:
    numbers = {
        field.name for field in dataclasses.fields(EngineConfig) if field.type in (int, int | None)
    }
    assert numbers == {*REQUIRED, *OPTIONAL, "max_bypass"}


@pytest.mark.parametrize("field", [*REQUIRED, *OPTIONAL])
def test_one_is_allowed(field: str) -> None:
    assert getattr(build(**{field: 1}), field) == 1


@pytest.mark.parametrize("field", [*REQUIRED, *OPTIONAL])
@pytest.mark.parametrize("value", [0, -1])
def test_less_than_one_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {value}; allowed: 1 or more$"):
        build(**{field: value})


@pytest.mark.parametrize("field", OPTIONAL)
def test_limits_that_can_be_derived_may_be_absent(field: str) -> None:
    assert getattr(build(**{field: None}), field) is None


def test_overtaking_may_be_forbidden_but_not_negative() -> None:
    assert build(max_bypass=0).max_bypass == 0
    with pytest.raises(ValueError, match=r"^max_bypass is -1; allowed: 0 or more$"):
        build(max_bypass=-1)


def test_every_running_sequence_can_decode_in_one_step() -> None:
    assert EngineConfig(max_num_seqs=8, max_num_batched_tokens=8).max_num_batched_tokens == 8
    with pytest.raises(ValueError, match=r"max_num_batched_tokens is 7; .*max_num_seqs=8"):
        EngineConfig(max_num_seqs=8, max_num_batched_tokens=7)


def test_limits_do_not_change_once_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().block_size = 0  # type: ignore[misc]
