"""Losses of a model without the heads that rankings put last."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from loadtests.head_curves.merging import Tell
from models.config import ModelConfig
from models.heads.importance import RANKINGS, Ranking, Scores, least_important, rank_heads
from models.heads.prune import prune
from models.train.evaluate import validation_loss
from models.transformer import Transformer

COMPARED: tuple[Ranking, ...] = tuple(name for name in RANKINGS if name != "random")


@dataclass(frozen=True, slots=True)
class Removal:
    """Losses in nats per token of held-out text.

    Attributes:
        counts: so many key/value heads are removed, from 0 on.
        losses: of each ranking, one for each count.
        drawn: the same of each draw.
        scores: of each ranking, for each layer and key/value head.
        spearman: rank correlation of each ranking with `ablation`, over all heads.
    """

    counts: list[int]
    losses: dict[Ranking, list[float]]
    drawn: list[list[float]]
    scores: dict[Ranking, list[list[float]]]
    spearman: dict[Ranking, float]


def measure_removal(
    model: Transformer,
    calibration: Sequence[Tensor],
    held_out: Tensor,
    *,
    draws: int,
    tell: Tell,
) -> Removal:
    """Every ranking, and draws with the seeds from 0 on.

    Args:
        calibration: int64 `[batch, tokens]` each, to rank with and to take means over.
        held_out: int64 `[rows, tokens]`.
        tell: is told what is done now, parts done and parts in all.

    Raises:
        ConfigError: heads cannot be removed.
    """
    scores = {
        name: rank_heads(
            model, calibration, name, on_progress=partial(tell, f"ranking heads by {name}")
        )
        for name in COMPARED
    }
    drawn = [rank_heads(model, calibration, "random", seed=seed) for seed in range(draws)]

    @cache  # rankings agree on many sets, on the empty one always
    def loss_without(removed: tuple[tuple[int, int], ...]) -> float:
        return validation_loss(prune(model, removed, calibration), held_out)

    counts = removal_counts(model.config)
    done, total = 0, (len(scores) + draws) * len(counts)

    def losses(of: Scores) -> list[float]:
        nonlocal done
        found: list[float] = []
        for count in counts:
            found.append(loss_without(tuple(least_important(of, count))))
            done += 1
            tell("removing heads", done, total)
        return found

    return Removal(
        counts,
        {name: losses(of) for name, of in scores.items()},
        [losses(of) for of in drawn],
        {name: [layer.tolist() for layer in of] for name, of in scores.items()},
        {name: spearman(of, scores["ablation"]) for name, of in scores.items()},
    )


def removal_counts(config: ModelConfig) -> list[int]:
    """None, and eighths of all key/value heads up to six, as far as each layer can keep one."""
    total = sum(heads.num_kv_heads for heads in config.layers)
    eighths = {total * eighth // 8 for eighth in range(7)}
    return sorted(count for count in eighths if count <= total - config.num_layers)


def spearman(one: Scores, other: Scores) -> float:
    """Rank correlation over the heads of all layers, -1 to 1."""
    ranks = torch.stack([_ranks(torch.cat(scores)) for scores in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Of float64 `[values]`, from the lowest on; equal ones share the mean of their ranks."""
    others = values[:, None]
    return ((others > values).double() + (others >= values).double()).sum(dim=1) / 2
