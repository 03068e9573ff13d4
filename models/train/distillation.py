"""Learning from what another model finds likely, not from the text alone (Hinton et al. 2015)."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from models.errors import ConfigError
from models.train.config import TrainConfig
from models.train.rows import IGNORED
from models.transformer import Transformer


def check_teacher(teacher: Transformer | None, student: Transformer, config: TrainConfig) -> None:
    """Whether a student can learn from a teacher.

    Raises:
        ConfigError: the configuration asks for a teacher and there is none, or the other way
            round; its tokens are others, or its context is shorter than the rows.
    """
    if teacher is None or not config.distillation:
        if teacher is not None or config.distillation:
            allowed = "above 0 with a teacher, 0 without one"
            raise ConfigError("distillation", config.distillation, allowed)
        return
    tokens, context = teacher.config.vocab_size, teacher.config.max_position_embeddings
    if tokens != student.config.vocab_size:
        allowed = f"{student.config.vocab_size}, those of the student"
        raise ConfigError("vocab_size of the teacher", tokens, allowed)
    longest = max(config.seq_len, config.final_seq_len)
    if context < longest:
        raise ConfigError("max_position_embeddings of the teacher", context, f"{longest} or more")


@torch.no_grad()
def teach(teacher: Transformer, input_ids: Tensor) -> Tensor:
    """The teacher's logits `[rows, tokens, vocab]`, float32, of int64 `[rows, tokens]`."""
    return teacher.project_to_vocab(teacher.forward_dense(input_ids))


def divergence(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ p_teacher · (log p_teacher − log p_student), at temperature 1; mean
    over the tokens, in nats.

    Args:
        teacher, student: logits `[rows, tokens, vocab]`.
        targets: int64 `[rows, tokens]`; tokens whose target is `IGNORED` are left out.
    """
    known = targets != IGNORED
    logs = student[known].log_softmax(dim=-1), teacher[known].log_softmax(dim=-1)
    return kl_div(*logs, reduction="batchmean", log_target=True)
