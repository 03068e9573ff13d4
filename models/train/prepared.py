"""What a training reads, kept for its next part, and what that was made of."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from models.checkpoints.loader import check_checkpoint, weight_files
from models.errors import ConfigError, CorpusError, TokenizerError, TrainingError
from models.tokenizer import read_tokenizer
from models.train.corpus import PARTS, Corpus
from models.train.files import replace_file
from models.train.tokenizer import BOS, encode_documents, train_tokenizer

STATE_FILE = "state.safetensors"
_RECORD, _TOKENS, _TOKENIZER = "corpus.json", "tokens.safetensors", "tokenizer.json"
_NAMES = {"corpus": "text", "start": "model to start from", "teacher": "teacher"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A text as a training reads it.

    Attributes:
        train, validation: int32 `[tokens]` to train on and to validate with.
    """

    tokenizer: Tokenizer
    train: Tensor
    validation: Tensor


def prepare(
    work: Path, corpus: Corpus, start: Path | None, teacher: Path | None, *, vocab_size: int
) -> Prepared:
    """The text with the tokenizer of `start`, or with one of its own; what `work` holds, if the
    training has begun before.

    Raises:
        CorpusError: a part of the corpus is empty.
        CheckpointError, ConfigError, TokenizerError: start or teacher cannot be loaded.
        TrainingError: `work` belongs to another training, is damaged, or cannot be written to.
    """
    began: dict[str, object] = {
        "corpus": corpus.describe(),
        "start": _digest(start),
        "teacher": _digest(teacher),
    }
    if (work / _RECORD).exists():
        _check_same(work, began)
        return _load(work)
    if (work / STATE_FILE).exists():
        raise _damaged(work / _RECORD, "it is missing")
    for part in PARTS:
        if not corpus.texts(part):
            raise CorpusError(f"no document of the corpus is in the part {part!r}; add some")
    if start is None:
        tokenizer = train_tokenizer(corpus.texts("train"), vocab_size)
    else:
        tokenizer = read_tokenizer(start)
        if (begin := tokenizer.encode("").ids) != [BOS]:
            raise ConfigError("what the tokenizer puts before a text", begin, f"{[BOS]}")
    prepared = Prepared(
        tokenizer,
        encode_documents(tokenizer, corpus.texts("train")),
        encode_documents(tokenizer, corpus.texts("validation")),
    )
    _save(work, prepared, began)
    return prepared


def _save(work: Path, prepared: Prepared, began: dict[str, object]) -> None:
    tokens = {"train": prepared.train, "validation": prepared.validation}
    try:
        replace_file(work / _TOKENIZER, prepared.tokenizer.to_str().encode())
        replace_file(work / _TOKENS, save(tokens))
        # Last, because it says that the others are there.
        replace_file(work / _RECORD, json.dumps(began, indent=2).encode())
    except OSError as error:
        raise TrainingError(f"{work} cannot be written to: {error}") from error


def _load(work: Path) -> Prepared:
    try:
        tokens = load_file(work / _TOKENS)
        train, validation = tokens["train"], tokens["validation"]
    except Exception as error:  # a damaged file fails in many ways
        raise _damaged(work / _TOKENS, error) from error
    try:
        return Prepared(read_tokenizer(work), train, validation)
    except TokenizerError as error:
        raise _damaged(work / _TOKENIZER, error) from error


def _check_same(work: Path, began: dict[str, object]) -> None:
    try:
        recorded = json.loads((work / _RECORD).read_text(encoding="utf-8"))
        others = [name for key, name in _NAMES.items() if recorded.get(key) != began[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(work / _RECORD, error) from error
    if others:
        raise TrainingError(
            f"the training in {work} began with another {' and another '.join(others)}; allowed: "
            "the same packages, Python version, start and teacher, or another directory"
        )


def _damaged(file: Path, reason: object) -> TrainingError:
    return TrainingError(
        f"{file} cannot be read: {reason}; to begin the training anew, delete {file.parent}"
    )


def _digest(checkpoint: Path | None) -> str | None:
    """SHA-256 of what decides what a model says, and of which text.

    Raises:
        CheckpointError, ConfigError, TokenizerError: it cannot be loaded.
    """
    if checkpoint is None:
        return None
    check_checkpoint(checkpoint)
    read_tokenizer(checkpoint)
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update((checkpoint / name).read_bytes())
    for file in weight_files(checkpoint):
        digest.update(file.read_bytes())
    return digest.hexdigest()
