"""Which of the figures asked for a model reaches, and by how much it misses the others."""

from collections.abc import Mapping
from statistics import fmean

from models.train.measure import Measured
from models.train.needles import NUM_NEEDLES, VALUES
from models.train.retrieval import Retrieval

_XZ_GATE = 0.85
_ABLATION_FACTOR = 20


def gate(measured: Measured) -> str:
    """Bits per byte beside those of xz, in one sentence."""
    ratio = measured.bits_per_byte / measured.compressors["xz"]
    after = measured.bits_per_byte / measured.xz_after_training
    said = "below" if ratio < _XZ_GATE else "NOT below"
    return (
        f"That is {ratio:.2f} of xz on the same files, {said} the {_XZ_GATE} asked for, and "
        f"{after:.2f} of what xz needs for them once it has seen the training text."
    )


def most_costly(without: Mapping[tuple[int, int], float]) -> str:
    """The head without which the loss grows most, and by how much."""
    (layer, head), growth = max(without.items(), key=lambda item: item[1])
    return f"{growth:+.3f} nats (layer {layer}, head {head})"


def verdict(measured: Measured) -> str:
    """What of the bars for heads is missed, in one sentence."""
    first, second = measured.repeat_losses
    induction, previous = measured.induction.score, measured.previous_token.score
    hurt, others = measured.without_best, fmean(measured.without_others.values())
    missed = [
        text
        for is_met, text in (
            (induction >= 0.8, f"the induction score is {induction:.3f}, not 0.8"),
            (previous >= 0.5, f"the previous-token score is {previous:.3f}, not 0.5"),
            (first >= 5, f"the loss of the first half is {first:.2f} nats, not 5"),
            (second <= 0.5, f"the loss of the second half is {second:.3f} nats, not 0.5"),
            (0 < hurt >= _ABLATION_FACTOR * others, _spread(measured)),
        )
        if not is_met
    ]
    return f"Missed: {'; '.join(missed)}." if missed else "All of it is met."


def retrieval(found: Retrieval | None) -> str:
    """How well needles are found, beside a guess; twice as good as that is where retrieval
    begins."""
    if found is None:
        return "Retrieval was not measured: rows of held-out text have no room for needles."
    guess = 1 / NUM_NEEDLES
    verb = "has formed" if found.accuracy >= 2 * guess else "has NOT formed"
    return (
        f"Retrieval {verb}: rows of {found.row_tokens} tokens of held-out text have {NUM_NEEDLES} "
        "lines such as `key 7341 is alpha` in them, and ask for these keys at their end. "
        f"{found.accuracy:.1%} of {found.num_answers} answers are right, where one of the row's "
        f"words, drawn, would be in {guess:.0%} and one of all {len(VALUES)} in "
        f"{1 / len(VALUES):.0%}; they have {found.loss:.2f} nats each. Best retrieval score, the "
        "weight of an answer's first token in the needle before it is to be said again: "
        f"{found.best}."
    )


def _spread(measured: Measured) -> str:
    """How far the best induction head is from mattering more than all others, and why."""
    hurt, others = measured.without_best, measured.without_others
    mean, total = fmean(others.values()), sum(others.values())
    text = f"without the best induction head the loss grows by {hurt:.3f} nats, "
    if mean <= 0:
        return f"{text}not at all"
    text += (
        f"{hurt / mean:.1f} times what it grows by without another on average ({mean:.4f}), not "
        f"{_ABLATION_FACTOR} times; {max(others.values()) / total:.0%} of what the others cost "
        f"together is one head's, {most_costly(others)}"
    )
    if measured.num_induction_heads > 1:
        text += (
            f". Heads stand in for each other: {measured.num_induction_heads} have an induction "
            "score of 0.5 or more"
        )
    return text
