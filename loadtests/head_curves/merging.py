"""Losses of a model whose key/value heads have been merged."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, get_args

import tokenizers
import torch
from torch import Tensor

from models.checkpoints.loader import load_model
from models.checkpoints.writer import save_model
from models.config import ModelConfig
from models.errors import ConfigError
from models.heads.convert import MergeMethod, convert
from models.train.config import TrainConfig
from models.train.evaluate import validation_loss, validation_rows
from models.train.rows import Rows
from models.train.tokenizer import BOS, encode_documents
from models.train.trainer import train
from models.transformer import Transformer
from service.commands.derived import Original

Tell: TypeAlias = Callable[[str, int, int], None]
METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)
# `make demo` trains longer, at twice the rate, on twice the share of rows that repeat.
LEARNING_RATE = 5e-4
REPEAT_SHARE = 0.1
NEEDLE_SHARE = 0.02
SEED = 0


@dataclass(frozen=True, slots=True)
class Merged:
    """One point of a curve.

    Attributes:
        uptrain_tokens: it was trained on for so many.
        loss: nats per token of held-out text.
    """

    method: MergeMethod
    uptrain_tokens: int
    kv_heads: int
    kv_bytes_per_token: int
    loss: float


def measure_merging(
    original: Original,
    calibration: Sequence[Tensor],
    held_out: Tensor,
    *,
    uptrain_tokens: int,
    tell: Tell,
) -> list[Merged]:
    """Each method at each number of key/value heads, as many as the original has to one; the
    aligned ones a second time, after uptraining on the text that was calibrated with.

    The original is trained on too, so that the gain from more training can be told from what
    merging costs.

    Args:
        calibration: int64 `[batch, tokens]` each.
        held_out: int64 `[rows, tokens]`.
        uptrain_tokens: 0 leaves uptraining out.
        tell: is told what is done now, parts done and parts in all.

    Raises:
        ConfigError: heads cannot be merged, or the model cannot be trained on.
    """
    counts = kv_head_counts(original.model.config)
    if len(counts) == 1:
        raise ConfigError("num_kv_heads", counts[0], "2 or more: there is nothing to merge")
    rows = _rows(original) if uptrain_tokens else None
    done, total = 0, len(METHODS) * len(counts)
    points: list[Merged] = []
    for method in METHODS:
        for count in counts:
            model = convert(original.model, count, calibration, method=method).model
            kv_bytes = model.config.kv_bytes_per_token()
            loss = validation_loss(model, held_out)
            points.append(Merged(method, 0, count, kv_bytes, loss))
            done += 1
            tell("merging heads", done, total)
            if rows is not None and method == "align":
                stage = f"uptraining with {count} key/value heads"
                trained = _uptrain(model, rows, uptrain_tokens, partial(tell, stage))
                loss = validation_loss(trained, held_out)
                points.append(Merged(method, uptrain_tokens, count, kv_bytes, loss))
    return points


def kv_head_counts(config: ModelConfig) -> list[int]:
    """The divisors of what the first layer has, the largest first."""
    most = config.layers[0].num_kv_heads
    return [count for count in range(most, 0, -1) if most % count == 0]


def _rows(original: Original) -> Rows:
    """Raises ConfigError: the tokenizer is not like that of the bundled models."""
    if (begin := original.tokenizer.encode("")) != [BOS]:
        allowed = f"{[BOS]}, which rows to train on begin with; without uptraining any"
        raise ConfigError("what the tokenizer puts before a text", begin, allowed)
    tokenizer = tokenizers.Tokenizer.from_file(str(original.path / "tokenizer.json"))
    tokens = encode_documents(tokenizer, original.calibration)
    return Rows(tokens, tokenizer, SEED, REPEAT_SHARE, NEEDLE_SHARE)


def _uptrain(
    model: Transformer, rows: Rows, num_tokens: int, tell: Callable[[int, int], None]
) -> Transformer:
    """As `headroom convert` and `headroom train-demo --start` do, one after the other."""
    context = model.config.max_position_embeddings
    config = TrainConfig(
        num_tokens,
        seq_len=min(256, context),
        final_seq_len=min(1024, context),
        learning_rate=LEARNING_RATE,
        repeat_share=REPEAT_SHARE,
        needle_share=NEEDLE_SHARE,
        seed=SEED,
    )
    with tempfile.TemporaryDirectory() as work:
        save_model(model, Path(work))
        trained = load_model(Path(work), dtype=torch.float32)
        train(
            trained,
            rows,
            validation_rows(rows.tokens, 1, config.seq_len),  # nobody is told its loss
            config,
            state_file=Path(work) / "state.safetensors",
            on_step=lambda now: tell(now.step, now.num_steps),
        )
    return trained
