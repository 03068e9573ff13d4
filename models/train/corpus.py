"""Text that every Python installation carries: the sources of its standard library (PSF-2.0)."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_HELD_OUT_OF_256 = 5


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to train on, and texts of other files to measure with."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def standard_library() -> Corpus:
    """Every UTF-8 source file of the standard library except its tests, about 12 MB.

    About 2 % of the files are held out, chosen by a hash of their path, so the choice is the same
    everywhere.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        (held_out if digest[0] < _HELD_OUT_OF_256 else train).append(text)
    return Corpus(tuple(train), tuple(held_out))


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose texts begin with `<bos>`; `<bos>` is id 0 and `<eos>` id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return tokenizer
