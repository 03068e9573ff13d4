"""Whether a model finds again what a text has said once, and which head looks there."""

from dataclasses import dataclass
from statistics import fmean

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.heads.inputs import attention_weights
from models.heads.metrics import BestHead, best_head, retrieval_score
from models.train.needles import needle_row
from models.train.rows import Rows
from models.transformer import Transformer

_NUM_ROWS = 64
_ROWS_AT_ONCE = 8
_ROW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Answers to the keys at the end of rows that `models.train.needles` makes.

    Attributes:
        row_tokens: of each row.
        num_answers: of all rows together.
        accuracy: share of answers all of whose tokens are the most likely ones.
        loss: nats per answer.
        best: the head that gives the token to be repeated the most weight.
    """

    row_tokens: int
    num_answers: int
    accuracy: float
    loss: float
    best: BestHead


@torch.inference_mode()
def measure_retrieval(
    model: Transformer, tokenizer: Tokenizer, tokens: Tensor, *, seed: int
) -> Retrieval | None:
    """On rows of text that was not trained on, int32 `[tokens]`; None if such a row, or the text,
    has no room for needles."""
    row_tokens = min(_ROW_TOKENS, model.config.max_position_embeddings)
    if len(tokens) < row_tokens:
        return None
    text = Rows(tokens, tokenizer, seed, repeat_share=0.0, needle_share=0.0).text
    generator = torch.Generator().manual_seed(seed)
    drawn = [needle_row(tokenizer, row_tokens, text, generator) for _ in range(_NUM_ROWS)]
    rows = [row for row in drawn if row is not None]
    if not rows:
        return None
    losses: list[float] = []
    are_right: list[bool] = []
    scores = [torch.zeros(heads.num_heads) for heads in model.config.layers]
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        batch = rows[first : first + _ROWS_AT_ONCE]
        ids = torch.stack([row.ids for row in batch]).to(model.device)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        logits = model.logits(inputs)
        lost = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        is_right = logits.argmax(dim=-1) == targets
        places: list[tuple[int, int, int]] = []
        for number, row in enumerate(batch):
            for answer in row.answers:
                predicted = slice(answer.start - 1, answer.start - 1 + answer.length)
                losses.append(float(lost.view_as(targets)[number, predicted].sum()))
                are_right.append(bool(is_right[number, predicted].all()))
                places.append((number, answer.start - 1, answer.found))
        for total, weights in zip(scores, attention_weights(model, inputs), strict=True):
            total += retrieval_score(weights, torch.tensor(places)).cpu() * len(places)
    num_answers = len(losses)
    best = best_head([total / num_answers for total in scores])
    return Retrieval(row_tokens, num_answers, fmean(are_right), fmean(losses), best)
