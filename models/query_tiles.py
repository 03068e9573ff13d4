"""The queries of a step in tiles, as a matrix unit takes them."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# Enough to use a matrix unit well; more would leave too few tiles.
_MAX_TILE_ROWS = 64


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """The queries of a step in tiles: a row is a token and one of the query heads that share a
    key/value head, all heads of a token before the next token.

    Attributes:
        seq: int32 `[tiles]`, whose queries.
        first_row: int32 `[tiles]`, the first of them, counted within the sequence.
        rows: of a tile, a power of two; the last tile of a sequence may have fewer.
    """

    seq: Tensor
    first_row: Tensor
    rows: int

    def split(self, num_tiles: int) -> "Iterator[QueryTiles]":
        """So many of them at once; none if there are none."""
        for first in range(0, len(self.seq), num_tiles):
            some = slice(first, first + num_tiles)
            yield QueryTiles(self.seq[some], self.first_row[some], self.rows)


def tile_rows(longest: int, least_rows: int) -> int:
    """Rows of the tiles of sequences with up to so many."""
    return max(least_rows, 1 << (min(longest, _MAX_TILE_ROWS) - 1).bit_length())
