"""Trains a small decoder on texts: AdamW, warm-up and cosine, resumable at any step."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.cpu.library import has_feature
from models.errors import ConfigError, TrainingError
from models.heads.metrics import repeat_losses
from models.train.config import TrainConfig
from models.train.distillation import check_teacher, divergence, teach
from models.train.evaluate import validation_loss
from models.train.head_options import HeadSimilarity, head_dropout, head_temperatures
from models.train.rows import IGNORED, Rows, ordinary_tokens, repeated
from models.train.state import Point, TrainState, load_state, save_state
from models.transformer import HeadEdit, Transformer

BETAS = 0.9, 0.95  # of AdamW
MAX_GRADIENT_NORM = 1.0
# An environment variable of cuBLAS, and what makes it sum alike each time.
REPRODUCIBLE_PRODUCTS = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_SECONDS_BETWEEN_SAVES = 60.0
_NUM_POINTS = 40


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a training is.

    Attributes:
        point: what was measured at this step, if something was.
        seconds_left: at the mean speed of this part of the training.
    """

    step: int
    num_steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    point: Point | None


def train(
    model: Transformer,
    rows: Rows,
    validation: Tensor,
    config: TrainConfig,
    *,
    state_file: Path,
    on_step: Callable[[TrainProgress], None],
    should_stop: Callable[[], bool] = lambda: False,
    teacher: Transformer | None = None,
) -> list[Point] | None:
    """Train in place; returns what was measured on the way, or None if it was stopped before.

    Goes on from `state_file` if it exists, and then ends with the same weights as a training that
    was never interrupted. The state is saved each minute, and when it is stopped.

    Args:
        validation: int64 `[rows, tokens]` of text that is not trained on.
        should_stop: is asked between steps.
        teacher: what is learned from too, as `config.distillation` says; stays as it is.

    Raises:
        ConfigError: rows are longer than the model's context or the text, or the teacher does not
            fit.
        TrainingError: the state cannot be read or written; or the loss is no number any more.
    """
    longest = max(config.seq_len, config.final_seq_len)
    allowed = min(model.config.max_position_embeddings, len(rows.tokens) - 1)
    if longest > allowed:
        raise ConfigError("seq_len", longest, f"up to {allowed}, of the context and the text")
    check_teacher(teacher, model, config)
    model.unpack_weights()
    with (
        _reproducible(model.device),
        head_temperatures(model) if config.head_temperature else nullcontext(),
    ):
        model.train().requires_grad_(True)
        try:
            return _train(
                model, teacher, rows, validation, config, state_file, on_step, should_stop
            )
        finally:
            model.eval().requires_grad_(False)


def _train(
    model: Transformer,
    teacher: Transformer | None,
    rows: Rows,
    validation: Tensor,
    config: TrainConfig,
    state_file: Path,
    on_step: Callable[[TrainProgress], None],
    should_stop: Callable[[], bool],
) -> list[Point] | None:
    optimizer = _optimizer(model, config)
    step, earlier, loss_sum = 0, 0.0, 0.0
    points: list[Point] = []
    if (state := load_state(state_file, config)) is not None:
        try:
            model.load_state_dict(state.model)
        except RuntimeError as error:
            raise TrainingError(f"{state_file} holds a model of another shape: {error}") from error
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state.optimizer})
        step, earlier, loss_sum, points = state.step, state.seconds, state.loss_sum, state.points
    first, started = step, time.monotonic()
    saved = started
    every = max(config.num_steps // _NUM_POINTS, 1)
    probe = repeat_probe(model, config.seed, batch=4).to(model.device)

    def save() -> None:
        seconds = earlier + time.monotonic() - started
        remembered = optimizer.state_dict()["state"]
        now = TrainState(step, seconds, loss_sum, points, model.state_dict(), remembered)
        save_state(state_file, config, now)

    batches = (_batch(rows, config, number) for number in range(step, config.num_steps))
    batch = next(batches, None)
    while batch is not None:
        if should_stop():
            save()
            return None
        computed = _step(model, teacher, optimizer, batch, config, step)
        batch = next(batches, None)  # while a GPU computes
        loss = float(computed)
        if not loss < float("inf"):
            raise TrainingError(
                f"the loss of step {step} is {loss}; train with a learning rate below "
                f"{config.learning_rate:g}"
            )
        step += 1
        loss_sum += loss
        elapsed = time.monotonic() - started
        point = None
        if step % every == 0 or step == config.num_steps:
            num_steps = step - (points[-1].step if points else 0)
            point = Point(
                step,
                loss_sum / num_steps,
                validation_loss(model, validation),
                repeat_losses(model, probe)[1],
                earlier + elapsed,
            )
            points.append(point)
            loss_sum = 0.0
        rate = (step - first) / elapsed
        left = (config.num_steps - step) / rate
        speed = rate * config.batch_tokens
        on_step(TrainProgress(step, config.num_steps, loss, speed, left, point))
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES or step == config.num_steps:
            save()
            saved = time.monotonic()
    return points


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """Sums in the same order each time: a GPU adds some of the gradients as they come.

    Raises:
        TrainingError: products on a GPU are not reproducible.
    """
    if device.type != "cuda":
        yield
        return
    name, value = REPRODUCIBLE_PRODUCTS
    if name not in os.environ:
        raise TrainingError(f"{name} is not set; allowed: {value}, before a GPU is first used")
    options: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), options.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    options.fill_uninitialized_memory = False  # nothing here reads it
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        options.fill_uninitialized_memory = before[1]


def probe_period(model: Transformer) -> int:
    """After how many tokens a probe repeats: 50, as in most of the literature, or what the context
    has room for."""
    return min(50, (model.config.max_position_embeddings - 1) // 2)


def repeat_probe(model: Transformer, seed: int, *, batch: int) -> Tensor:
    """`<bos>` and random tokens that come twice, int64 `[batch, 1 + 2 * period]`."""
    period = probe_period(model)
    generator = torch.Generator().manual_seed(seed)
    return repeated(batch, period, 2 * period, ordinary_tokens(model.config.vocab_size), generator)


def _batch(rows: Rows, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step."""
    seq_len = config.seq_len_at(step)
    difficulty = config.repeat_difficulty_at(step)
    return rows.at(step, config.batch_tokens // seq_len, seq_len, difficulty)


def _step(
    model: Transformer,
    teacher: Transformer | None,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    config: TrainConfig,
    step: int,
) -> Tensor:
    """One step; returns its loss on the text alone, which a GPU may still compute."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    inputs, targets = (part.to(model.device) for part in batch)
    similarity = HeadSimilarity() if config.head_diversity else None
    edits: list[HeadEdit] = [] if similarity is None else [similarity]
    if config.head_dropout:
        edits.append(head_dropout(config.head_dropout, config.seed * 1_000_003 + step))

    def edit(layer: int, attended: Tensor) -> Tensor:
        for one in edits:
            attended = one(layer, attended)
        return attended

    with torch.autocast(model.device.type, torch.bfloat16, enabled=has_bfloat16(model.device)):
        hidden = model.forward_dense(
            inputs, edit=edit if edits else None, recompute=config.recompute
        )
        logits = model.project_to_vocab(hidden)
        taught = None if teacher is None else teach(teacher, inputs)
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    total = loss
    if taught is not None:
        total = torch.lerp(loss, divergence(taught, logits, targets), config.distillation)
    if similarity is not None:
        total = total + config.head_diversity * similarity.mean
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach()


def _optimizer(model: Transformer, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=BETAS,
        fused=True,
    )


def has_bfloat16(device: torch.device) -> bool:
    """Whether products are computed in bfloat16: on processors, only those with instructions for it
    are faster with it."""
    return device.type != "cpu" or has_feature("avx512_bf16")
