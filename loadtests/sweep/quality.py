"""What the checkpoints of a sweep lose: bits per byte, all of them on one text."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from models.bits_per_byte import MAX_WINDOW, bits_per_byte
from models.checkpoints.loader import load_model
from models.tokenizer import Tokenizer
from models.train.corpus import build_corpus
from models.train.sources import STANDARD_LIBRARY

if TYPE_CHECKING:
    from loadtests.sweep.configurations import Configuration
    from loadtests.sweep.results import Results


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Which text the checkpoints are measured on.

    Attributes:
        file: UTF-8; None is Python's standard library, those documents of it that the demo models
            were not trained on.
        num_bytes: so much of it, from its beginning, up to a whole character; None is all.
    """

    file: Path | None = None
    num_bytes: int | None = None

    def read(self) -> list[str]:
        """Its documents.

        Raises:
            OSError, UnicodeDecodeError: the file cannot be read.
        """
        if self.file is not None:
            documents = [self.file.read_text(encoding="utf-8")]
        else:
            documents = build_corpus(Path(), (STANDARD_LIBRARY,)).texts("held_out")
        if self.num_bytes is None:
            return documents
        kept: list[str] = []
        left = self.num_bytes
        for document in documents:
            data = document.encode()[:left]
            kept.append(data.decode(errors="ignore"))
            left -= len(data)
        return [document for document in kept if document]

    def to_dict(self) -> dict[str, Any]:
        """What a file says of it."""
        return {
            "text": None if self.file is None else str(self.file),
            "bytes": self.num_bytes,
        }

    def describe(self) -> dict[str, Any]:
        """What a report says of it, with a digest of its content."""
        documents = self.read()
        data = "".join(documents).encode()
        return {
            "name": "Python's standard library, held-out documents"
            if self.file is None
            else self.file.name,
            "documents": len(documents),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def measure_quality(
    configurations: list["Configuration"], text: HeldOutText, results: "Results", console: Console
) -> None:
    """Measure checkpoints, each in the type that it is served in; every figure is kept at once."""
    documents = text.read()
    total = sum(len(document.encode()) for document in documents)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for one in configurations:
            assert one.directory is not None, "random weights are not measured"
            label = f"bits per byte of {one.name}"
            if not console.is_terminal:
                console.print(label)
            task = progress.add_task(label, total=total)
            model = load_model(one.directory)
            tokenizer = Tokenizer.for_model(one.directory, model.config)
            bits = bits_per_byte(
                model,
                tokenizer,
                documents,
                on_bytes=functools.partial(progress.advance, task),
            )
            window = min(model.config.max_position_embeddings, MAX_WINDOW)
            results.add_quality(
                one.name,
                {"bits_per_byte": bits, "window": window, "dtype": model.config.dtype},
            )
