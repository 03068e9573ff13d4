"""What a training step reads. A row depends on seed, step and place only, so any step can be
made again after an interruption."""

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.train.needles import needle_row
from models.train.tokenizer import BOS, SPECIAL_TOKENS

IGNORED = -100  # cross_entropy leaves such targets out
# Of the easiest repetitions and of the hardest.
_SHORTEST_PERIOD = 4, 16
_LONGEST_PERIOD = 24, 256
_FEWEST_TOKENS = 64  # the hardest have the whole vocabulary


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a step: text, with some sequences that only induction or retrieval can predict.

    Attributes:
        tokens: int32 `[tokens]`, all text.
        seed: decides everything that is drawn.
        repeat_share: part of the rows that are random tokens which repeat.
        needle_share: part of the rows with keys to be found again.
    """

    tokens: Tensor
    tokenizer: Tokenizer
    seed: int
    repeat_share: float
    needle_share: float

    def at(
        self, step: int, num_rows: int, seq_len: int, difficulty: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 `[num_rows, seq_len]`; targets that nothing can
        predict are `IGNORED`.

        Args:
            difficulty: 0 to 1, of the rows that repeat: by equal factors from few tokens and short
                periods to the whole vocabulary and long ones.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        kinds = torch.rand(num_rows, generator=generator).tolist()
        rows = [self._row(kind, seq_len, difficulty, generator) for kind in kinds]
        inputs, targets = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return inputs, targets

    def _row(
        self, kind: float, seq_len: int, difficulty: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if kind < self.repeat_share:
            shortest, longest = (
                min(_between(*periods, difficulty), seq_len // 2)
                for periods in (_SHORTEST_PERIOD, _LONGEST_PERIOD)
            )
            period = _draw(shortest, longest + 1, generator)
            ids = repeated(1, period, seq_len, self._repeating(difficulty), generator)[0]
            known = torch.arange(seq_len + 1) > period
        elif (
            kind < self.repeat_share + self.needle_share
            # None in the short rows of tests
            and (needles := needle_row(self.tokenizer, seq_len + 1, self.text, generator))
        ):
            ids, known = needles.ids, needles.known
        else:
            ids = self.text(seq_len + 1, generator)
            known = torch.ones(seq_len + 1, dtype=torch.bool)
        return ids[:-1], ids.where(known, IGNORED)[1:]

    def _repeating(self, difficulty: float) -> Tensor:
        """The tokens that repeat now, in order: always the same ones first, and ever more."""
        choices = ordinary_tokens(self.tokenizer.get_vocab_size())
        fewest = min(_FEWEST_TOKENS, len(choices))
        num_tokens = _between(fewest, len(choices), difficulty)
        order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(self.seed))
        return choices[order[:num_tokens].sort().values]

    def text(self, length: int, generator: torch.Generator) -> Tensor:
        """A window of the text behind `<bos>`, which every prompt begins with too; int64
        `[length]`."""
        start = _draw(0, len(self.tokens) - length + 1, generator)
        ids = self.tokens[start : start + length].long()
        ids[0] = BOS
        return ids


def ordinary_tokens(vocab_size: int) -> Tensor:
    """All but the special tokens; int64 `[tokens]`."""
    return torch.arange(len(SPECIAL_TOKENS), vocab_size)


def repeated(
    batch: int, period: int, num_tokens: int, choices: Tensor, generator: torch.Generator
) -> Tensor:
    """`<bos>` and `num_tokens` tokens that repeat `period` random ones out of int64 `[choices]`;
    int64 `[batch, num_tokens + 1]`."""
    random = choices[torch.randint(len(choices), (batch, period), generator=generator)]
    tiled = random.repeat(1, -(-num_tokens // period))[:, :num_tokens]
    return torch.cat((torch.full((batch, 1), BOS), tiled), dim=1)


def _between(first: int, last: int, share: float) -> int:
    """From `first` to `last` by equal factors."""
    return round(first * math.pow(last / first, share))


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))
