"""The bundled demo models, from text to a checkpoint directory with its card."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.checkpoints.loader import load_model, weight_files
from models.checkpoints.writer import save_model
from models.config import HeadConfig, ModelConfig
from models.errors import CheckpointError, ConfigError, CorpusError, TrainingError
from models.positions import RopeConfig
from models.train.card import write_card
from models.train.config import TrainConfig
from models.train.corpus import PARTS, Corpus, Part
from models.train.curve import loss_curve
from models.train.evaluate import validation_rows
from models.train.measure import measure
from models.train.rows import Rows
from models.train.tokenizer import EOS, encode_documents, train_tokenizer
from models.train.trainer import TrainProgress, train
from models.transformer import Transformer, random_model

VOCAB_SIZE = 4096
_NUM_VALIDATION_ROWS = 32
_TRAINED: tuple[Part, ...] = ("train", "validation")


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
    on_step: Callable[[TrainProgress], None],
    should_stop: Callable[[], bool] = lambda: False,
    device: str = "cpu",
) -> float | None:
    """Train a model into a directory; returns its held-out bits per byte, or None if it was
    stopped before its end. The same call goes on where it was stopped.

    Args:
        command: what makes the model again, for the card.

    Raises:
        CorpusError: a part of the corpus is empty.
        CheckpointError, ConfigError: the model to start from, or the teacher, cannot be loaded,
            or has another vocabulary.
        TrainingError: `paths.work` belongs to another training, or a directory cannot be written
            to; see `train` too.
    """
    tokenizer, tokens, validation = _prepare(paths, corpus)
    model = _first_model(paths, tokenizer, config.seed, device)
    teacher = None
    if paths.teacher is not None:
        _check_vocabulary(paths.teacher, tokenizer)
        teacher = load_model(paths.teacher, dtype=torch.float32, device=device)
    points = train(
        model,
        Rows(tokens, tokenizer, config.seed, config.repeat_share),
        validation_rows(validation, _NUM_VALIDATION_ROWS, config.seq_len),
        config,
        state_file=paths.work / "state.safetensors",
        on_step=on_step,
        should_stop=should_stop,
        teacher=teacher,
    )
    if points is None:
        return None
    try:
        # Half the size; config.json says float32, which is what computes everywhere.
        save_model(model, paths.output, stored_as=torch.bfloat16)
        tokenizer.save(str(paths.output / "tokenizer.json"))
        described = json.dumps(corpus.describe(), indent=2) + "\n"
        (paths.output / "corpus.json").write_text(described, encoding="utf-8")
        curve = loss_curve(points, f"{paths.output.name}: losses while it was trained")
        (paths.output / "loss.svg").write_text(curve, encoding="utf-8")
        measured = measure(load_model(paths.output, device=device), tokenizer, corpus)
        origin = paths.start, paths.teacher
        write_card(paths.output, config, points, measured, corpus, command, origin)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{paths.output} cannot be written to: {error}; what was learned is in {paths.work}"
        ) from error
    return measured.bits_per_byte


def _first_model(paths: DemoPaths, tokenizer: Tokenizer, seed: int, device: str) -> Transformer:
    if paths.start is None:
        config = demo_config(tokenizer.get_vocab_size()).replace(name=paths.output.name)
        return random_model(config, seed=seed, device=device)
    return load_model(paths.start, dtype=torch.float32, device=device)


def _prepare(paths: DemoPaths, corpus: Corpus) -> tuple[Tokenizer, Tensor, Tensor]:
    """The tokenizer, and tokens to train on and to validate with; kept for the next part of the
    training."""
    began = {"corpus": corpus.describe(), "start": str(paths.start)}
    if paths.teacher is not None:
        began["teacher"] = _digest(paths.teacher)
    described = json.dumps(began, indent=2)
    recorded, tokens_file = paths.work / "corpus.json", paths.work / "tokens.safetensors"
    tokenizer_file = paths.work / "tokenizer.json"
    if recorded.exists() and recorded.read_text(encoding="utf-8") != described:
        raise TrainingError(
            f"the text is not the one that the training in {paths.work} began with, or start or "
            "teacher are not; allowed: the same packages, Python version, start and teacher, or "
            "another directory"
        )
    for part in PARTS:
        if not corpus.texts(part):
            raise CorpusError(f"no document of the corpus is in the part {part!r}; add some")
    if recorded.exists():
        tokens = load_file(tokens_file)
        return Tokenizer.from_file(str(tokenizer_file)), tokens["train"], tokens["validation"]
    if paths.start is None:
        tokenizer = train_tokenizer(corpus.texts("train"), VOCAB_SIZE)
    else:
        tokenizer = _tokenizer_of(paths.start)
    tokens = {part: encode_documents(tokenizer, corpus.texts(part)) for part in _TRAINED}
    try:
        paths.work.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(tokenizer_file))
        save_file(tokens, tokens_file)
        recorded.write_text(described, encoding="utf-8")
    except Exception as error:  # the libraries raise errors of their own for a full disk
        raise TrainingError(f"{paths.work} cannot be written to: {error}") from error
    return tokenizer, tokens["train"], tokens["validation"]


def _digest(checkpoint: Path) -> str:
    """SHA-256 of what decides what a model says."""
    digest = hashlib.sha256()
    for file in (checkpoint / "config.json", *weight_files(checkpoint)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _check_vocabulary(teacher: Path, tokenizer: Tokenizer) -> None:
    if _tokenizer_of(teacher).get_vocab() != tokenizer.get_vocab():
        allowed = "that of the model that learns; --start with the teacher, or a model made of it"
        raise ConfigError("vocabulary of the teacher", str(teacher), allowed)


def _tokenizer_of(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{file} is missing")
    return Tokenizer.from_file(str(file))
