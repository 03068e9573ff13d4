"""Trains a small decoder on texts: AdamW, warm-up and cosine, bf16 where it is faster."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.transformer import Transformer

_EOS = 1


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how fast to learn.

    Attributes:
        max_seconds: the learning-rate schedule ends after this wall time.
        batch_tokens: tokens per step.
        seq_len: tokens per row, short because attention over long rows is slow to train.
        final_seq_len: tokens per row for the last `final_share` of the time, so that the model
            meets every position of its context.
        learning_rate: its peak; the schedule ends at a tenth of it.
    """

    max_seconds: float
    batch_tokens: int = 8192
    seq_len: int = 256
    final_seq_len: int = 1024
    final_share: float = 0.2
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.02
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a training is; `share` is the part of its time that has passed."""

    step: int
    share: float
    loss: float
    tokens_per_second: float


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All documents behind one another, each as `<bos> ... <eos>`; int64 `[tokens]`."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids.extend(encoding.ids)
        ids.append(_EOS)
    return torch.tensor(ids, dtype=torch.int64)


def train(
    model: Transformer,
    tokens: Tensor,
    config: TrainConfig,
    on_step: Callable[[TrainProgress], None],
) -> int:
    """Train in place on int64 `[tokens]`; returns the number of tokens seen."""
    model.unpack_weights()
    model.train().requires_grad_(True)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(config.seed)
    started = time.monotonic()
    step = seen = 0
    while (share := (time.monotonic() - started) / config.max_seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(share, config.warmup_share)
        seq_len = config.seq_len if share < 1 - config.final_share else config.final_seq_len
        starts = torch.randint(
            0, len(tokens) - seq_len, (config.batch_tokens // seq_len, 1), generator=generator
        )
        rows = tokens[starts + torch.arange(seq_len + 1)].to(model.device)
        loss = _loss(model, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen += rows.numel() - len(rows)
        rate = seen / (time.monotonic() - started)
        on_step(TrainProgress(step, share, float(loss.detach()), rate))
    model.eval().requires_grad_(False)
    return seen


@torch.inference_mode()
def bits_per_byte(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Compression of texts by the model: its loss in bits over the UTF-8 bytes of the texts.

    Long texts are cut into windows of the model's context, each scored on its own.
    """
    nats = 0.0
    window = model.config.max_position_embeddings
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = torch.tensor(encoding.ids, dtype=torch.int64, device=model.device)
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window]
            logits = model.logits(part[None, :-1])[0]
            nats += float(cross_entropy(logits, part[1:], reduction="sum"))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def _loss(model: Transformer, rows: Tensor) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model.project_to_vocab(model.forward_dense(rows[:, :-1]))
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _schedule(share: float, warmup_share: float) -> float:
    if share < warmup_share:
        return share / warmup_share
    remaining = (share - warmup_share) / (1 - warmup_share)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * remaining))
