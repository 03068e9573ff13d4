"""The bundled demo models, from text to a checkpoint directory with its card."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from models.checkpoints.history import Step, Training, read_history, write_history
from models.checkpoints.loader import load_model
from models.checkpoints.writer import check_exportable, save_model
from models.config import HeadConfig, ModelConfig
from models.errors import ConfigError, TrainingError
from models.positions import RopeConfig
from models.tokenizer import read_tokenizer
from models.train.card import write_card
from models.train.config import TrainConfig
from models.train.corpus import Corpus
from models.train.curve import loss_curve
from models.train.evaluate import validation_rows
from models.train.measure import measure
from models.train.prepared import STATE_FILE, prepare
from models.train.rows import Rows
from models.train.tokenizer import BOS, EOS
from models.train.trainer import TrainProgress, has_bfloat16, train
from models.transformer import Transformer, random_model

VOCAB_SIZE = 4096
_NUM_VALIDATION_ROWS = 32


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where a training reads and writes.

    Attributes:
        output: the checkpoint.
        work: what makes the training resumable; may be deleted when it has ended.
        start: a checkpoint to go on from; None begins with random weights.
        teacher: a checkpoint to learn from, as `TrainConfig.distillation` says.
    """

    output: Path
    work: Path
    start: Path | None = None
    teacher: Path | None = None

    @property
    def state_file(self) -> Path:
        """What has been learned up to now."""
        return self.work / STATE_FILE


def demo_config(vocab_size: int = VOCAB_SIZE) -> ModelConfig:
    """5.1 M parameters, multi-head: what conversions and pruning start from."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=704,
        layers=(HeadConfig(8, 8, 32, rope=RopeConfig(theta=10_000.0, rotary_dim=32)),) * 5,
        max_position_embeddings=1024,
        norm="rms_norm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        eos_token_ids=(EOS,),
        name="demo",
    )


def make_demo(
    paths: DemoPaths,
    corpus: Corpus,
    config: TrainConfig,
    *,
    command: str,
    machine: dict[str, str | int],
    on_step: Callable[[TrainProgress], None],
    should_stop: Callable[[], bool] = lambda: False,
    device: str = "cpu",
) -> float | None:
    """Train a model into a directory; returns its held-out bits per byte, or None if it was
    stopped before its end. The same call goes on where it was stopped.

    Args:
        command: what makes the model again, for the card.
        machine: what times and bits depend on, as `Training.machine`.

    Raises:
        CorpusError: a part of the corpus is empty.
        CheckpointError, ConfigError, TokenizerError: the model to start from, or the teacher,
            cannot be loaded, or has another vocabulary; or what is made of it could not be saved.
        TrainingError: `paths.work` belongs to another training, or a directory cannot be written
            to; see `train` too.
    """
    history = _history(paths)
    prepared = prepare(paths.work, corpus, paths.start, paths.teacher, vocab_size=VOCAB_SIZE)
    tokenizer = prepared.tokenizer
    model = _first_model(paths, tokenizer.get_vocab_size(), config.seed, device)
    points = train(
        model,
        Rows(prepared.train, tokenizer, config.seed, config.repeat_share, config.needle_share),
        validation_rows(prepared.validation, _NUM_VALIDATION_ROWS, config.seq_len),
        config,
        state_file=paths.state_file,
        on_step=on_step,
        should_stop=should_stop,
        teacher=_teacher(paths, tokenizer, device),
    )
    if points is None:
        return None
    training = Training(
        config.num_steps * config.batch_tokens,
        config.learning_rate,
        points[-1].seconds,
        "bfloat16" if has_bfloat16(model.device) else "float32",
        machine,
    )
    history.append(Step(paths.output.name, command, training))
    try:
        # Half the size; config.json says float32, which is what computes everywhere.
        token_ids = {"bos_token_id": BOS, "pad_token_id": tokenizer.token_to_id("<pad>")}
        save_model(model, paths.output, stored_as=torch.bfloat16, token_ids=token_ids)
        written = {
            "tokenizer.json": tokenizer.to_str(pretty=True),
            "corpus.json": json.dumps(corpus.describe(), indent=2) + "\n",
            "loss.svg": loss_curve(points, f"{paths.output.name}: losses while it was trained"),
        }
        for name, content in written.items():
            (paths.output / name).write_text(content, encoding="utf-8")
        write_history(paths.output, history)
        measured = measure(load_model(paths.output, device=device), tokenizer, corpus)
        origin = paths.start, paths.teacher
        write_card(paths.output, config, points, measured, corpus, history, origin)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{paths.output} cannot be written to: {error}; what was learned is in {paths.work}"
        ) from error
    return measured.bits_per_byte


def _history(paths: DemoPaths) -> list[Step]:
    """The steps to what is learned from, each once: a start often came from its teacher."""
    steps: list[Step] = []
    for directory in (paths.start, paths.teacher):
        known = [] if directory is None else read_history(directory)
        steps += [step for step in known if step not in steps]
    return steps


def _first_model(paths: DemoPaths, vocab_size: int, seed: int, device: str) -> Transformer:
    """Raises ConfigError: what is learned could not be saved."""
    if paths.start is None:
        config = demo_config(vocab_size).replace(name=paths.output.name)
        return random_model(config, seed=seed, device=device)
    model = load_model(paths.start, dtype=torch.float32, device=device)
    check_exportable(model.config)
    return model


def _teacher(paths: DemoPaths, tokenizer: Tokenizer, device: str) -> Transformer | None:
    if paths.teacher is None:
        return None
    if read_tokenizer(paths.teacher).get_vocab() != tokenizer.get_vocab():
        allowed = "that of the model that learns; --start with the teacher, or a model made of it"
        raise ConfigError("vocabulary of the teacher", str(paths.teacher), allowed)
    return load_model(paths.teacher, dtype=torch.float32, device=device)
