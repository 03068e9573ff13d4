"""Which key/value heads become one."""

import random

from torch import Tensor

_NUM_STARTS = 20


def contiguous_groups(num_heads: int, num_groups: int) -> list[list[int]]:
    """Neighbours together."""
    size = num_heads // num_groups
    return [list(range(start, start + size)) for start in range(0, num_heads, size)]


def similar_groups(similarity: Tensor, num_groups: int) -> list[list[int]]:
    """Groups of equal size whose members are alike: the sum of `similarity` `[heads, heads]` within
    groups is one that no exchange of two heads makes larger; the best of several starts.

    Each group and the list of them are sorted.
    """
    values: list[list[float]] = similarity.tolist()
    num_heads = len(values)
    draw = random.Random(0)  # noqa: S311, the starts only have to differ
    best, best_sum = contiguous_groups(num_heads, num_groups), float("-inf")
    for start in range(_NUM_STARTS):
        order = list(range(num_heads))
        if start:
            draw.shuffle(order)
        groups = [[order[i] for i in g] for g in contiguous_groups(num_heads, num_groups)]
        while _exchange(groups, values):
            pass
        total = sum(values[a][b] for group in groups for a in group for b in group)
        if total > best_sum:
            best, best_sum = groups, total
    return sorted(sorted(group) for group in best)


def _exchange(groups: list[list[int]], values: list[list[float]]) -> bool:
    """Exchange two heads of different groups if that is better; whether it was done."""
    for index, one in enumerate(groups):
        for other in groups[index + 1 :]:
            for i, a in enumerate(one):
                for j, b in enumerate(other):
                    gain = sum(values[b][c] - values[a][c] for c in one if c != a)
                    gain += sum(values[a][c] - values[b][c] for c in other if c != b)
                    if gain > 1e-9:  # rounding must not exchange them back and forth
                        one[i], other[j] = b, a
                        return True
    return False
