"""The oracle is transformers itself, on models of every family with every parameter random."""

import pytest

from models.checkpoints.families import FAMILIES
from tests.parity import measure
from tests.parity.measure import Pair
from tests.parity.row import FINE, Row
from tests.parity.rows import ROWS


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    row: Row = request.param
    return measure.make_pair(row, tmp_path_factory.mktemp("parity"))


def test_every_family_has_a_row() -> None:
    assert {row.family for row in ROWS} == set(FAMILIES)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_logits_equal(pair: Pair) -> None:
    assert pair.ours.config.family == pair.row.family
    for length in pair.row.lengths:
        assert measure.logit_error(pair, length) <= measure.LOGIT_BAR, f"{length} tokens"
    assert measure.logit_spread(pair) > 0.5, "logits that all agree prove nothing"


def test_padding_of_their_batch_changes_nothing(pair: Pair) -> None:
    if measure.has_batches(pair):
        assert measure.padded_error(pair) <= measure.LOGIT_BAR


def test_bfloat16_error_is_at_most_twice_theirs(pair: Pair) -> None:
    ours, theirs = measure.bfloat16_errors(pair)
    assert ours <= 2 * theirs


def test_greedy_tokens_equal(pair: Pair) -> None:
    if not pair.ours.config.is_causal:
        return
    prompts = measure.greedy_prompts()
    outputs = measure.our_greedy(pair, prompts)
    assert outputs == measure.their_greedy(pair, prompts)
    assert len({token for tokens in outputs for token in tokens}) > 1, "constants prove nothing"


def test_log_probabilities_of_sampled_tokens_equal(pair: Pair) -> None:
    if not pair.ours.config.is_causal or not measure.has_batches(pair):
        return  # of a rotation that depends on the length, theirs knows the final one only
    error, distinct = measure.sampled_error(pair)
    assert error <= 2 * measure.LOGIT_BAR, "of the token's logit, and of the sum of all"
    assert distinct > 5, "constants prove nothing"


def test_every_feature_matters(pair: Pair) -> None:
    """What moves nothing when it is switched off could as well be wrong."""
    for name, change in pair.row.switches.items():
        bar = measure.FINE_POWER_BAR if name in FINE else measure.POWER_BAR
        assert measure.power(pair, change) >= bar, name
