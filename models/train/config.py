"""How long and how fast to learn."""

import math
from dataclasses import dataclass

from models.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast to learn.

    Attributes:
        num_tokens: the training ends after at least so many.
        batch_tokens: tokens per step.
        seq_len: tokens per row, short because attention over long rows is slow to train.
        final_seq_len: tokens per row for the last `final_share` of the steps, so that the model
            meets every position of its context.
        learning_rate: its peak; the schedule is a warm-up, then a cosine to a tenth of it.
        warmup_share: part of the steps in which the rate grows.
        repeat_share: part of the rows that are random tokens which repeat; only induction heads can
            predict those.
        repeat_growth: share of the steps in which these grow from few tokens and short periods to
            the whole vocabulary and long ones. Small models learn no induction in millions of
            tokens without.
        needle_share: part of the rows that are text with keys and their values in it, and the keys
            once more; only retrieval can predict the values.
        head_dropout: probability that a head is left out of a row, the others being scaled up
            (Zhou et al. 2020).
        head_diversity: factor of the mean cosine of what two heads of a layer read, which is
            added to the loss (Li et al. 2018).
        head_temperature: give each query head a learned factor on its scores, which becomes part
            of its weights at the end.
        recompute: run layers once more in the backward pass instead of keeping what they computed
            (gradient checkpointing, Chen et al. 2016).
        distillation: share of the loss that is the divergence from a teacher, KL(teacher ‖ model),
            the rest being the loss on the text (Hinton et al. 2015); 0 is without a teacher.
        seed: decides the first weights and all that is drawn.
    """

    num_tokens: int
    batch_tokens: int = 2048
    seq_len: int = 256
    final_seq_len: int = 1024
    final_share: float = 0.15
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.02
    repeat_share: float = 0.10
    repeat_growth: float = 0.0
    needle_share: float = 0.02
    head_dropout: float = 0.0
    head_diversity: float = 0.0
    head_temperature: bool = False
    recompute: bool = False
    distillation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        longest = max(self.seq_len, self.final_seq_len)
        lengths = self.seq_len, self.final_seq_len
        if self.batch_tokens < longest or any(self.batch_tokens % length for length in lengths):
            allowed = f"a multiple of {self.seq_len} and {self.final_seq_len} tokens, its rows"
            raise ConfigError("batch_tokens", self.batch_tokens, allowed)
        if self.num_tokens < longest:
            raise ConfigError("num_tokens", self.num_tokens, f"{longest} or more")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError("learning_rate", self.learning_rate, "a finite number above 0")
        if not 0 <= self.repeat_share <= 0.9:
            raise ConfigError("repeat_share", self.repeat_share, "0 to 0.9")
        if not 0 <= self.repeat_growth <= 1:
            raise ConfigError("repeat_growth", self.repeat_growth, "0 to 1")
        if not 0 <= self.needle_share <= 1 - self.repeat_share:
            allowed = f"0 to {1 - self.repeat_share:g}, what repeat_share leaves"
            raise ConfigError("needle_share", self.needle_share, allowed)
        if not 0 <= self.head_dropout < 1:
            raise ConfigError("head_dropout", self.head_dropout, "0 or more, below 1")
        if not 0 <= self.head_diversity < math.inf:
            raise ConfigError("head_diversity", self.head_diversity, "a finite number, 0 or more")
        if not 0 <= self.distillation <= 1:
            raise ConfigError("distillation", self.distillation, "0 to 1")
        if self.recompute and self.head_diversity:
            allowed = "false, because head_diversity needs what layers computed"
            raise ConfigError("recompute", True, allowed)

    @property
    def num_steps(self) -> int:
        return -(-self.num_tokens // self.batch_tokens)

    def seq_len_at(self, step: int) -> int:
        is_final = step >= self.num_steps * (1 - self.final_share)
        return self.final_seq_len if is_final else self.seq_len

    def repeat_difficulty_at(self, step: int) -> float:
        """0 to 1, as `Rows.at` takes it."""
        steps = self.repeat_growth * self.num_steps
        return min(step / steps, 1.0) if steps else 1.0

    def learning_rate_at(self, step: int) -> float:
        share = (step + 1) / self.num_steps
        if share < self.warmup_share:
            return self.learning_rate * share / self.warmup_share
        remaining = (share - self.warmup_share) / (1 - self.warmup_share)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * remaining)))
