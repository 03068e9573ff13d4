"""Groups are those that a search through all of them finds."""

from itertools import combinations

import pytest
import torch

from models.heads.grouping import contiguous_groups, similar_groups


def best_by_search(values: torch.Tensor, size: int) -> float:
    """The largest sum within groups of a size, over all ways to make them."""

    def search(left: frozenset[int]) -> float:
        if not left:
            return 0.0
        first, *rest = sorted(left)
        return max(
            sum(float(values[a, b]) for a in (first, *others) for b in (first, *others))
            + search(left - {first, *others})
            for others in combinations(rest, size - 1)
        )

    return search(frozenset(range(len(values))))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_heads", "num_groups"), [(6, 2), (6, 3), (8, 4), (8, 2)])
def test_no_grouping_is_better(seed: int, num_heads: int, num_groups: int) -> None:
    values = torch.rand(num_heads, num_heads, generator=torch.Generator().manual_seed(seed))
    values = values + values.T
    groups = similar_groups(values, num_groups)
    assert sorted(head for group in groups for head in group) == list(range(num_heads))
    assert {len(group) for group in groups} == {num_heads // num_groups}
    total = sum(float(values[a, b]) for group in groups for a in group for b in group)
    assert total == pytest.approx(best_by_search(values, num_heads // num_groups), rel=1e-6)


def test_neighbours_are_together() -> None:
    assert contiguous_groups(6, 2) == [[0, 1, 2], [3, 4, 5]]
    assert contiguous_groups(4, 4) == [[0], [1], [2], [3]]
