"""The corpus: documents of all sources, split the same way everywhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from models.train.packages import unpack
from models.train.sources import SOURCES, Source

Part: TypeAlias = Literal["train", "validation", "held_out"]
PARTS: tuple[Part, ...] = ("train", "validation", "held_out")


@dataclass(frozen=True, slots=True)
class Document:
    source: str
    name: str
    text: str

    @property
    def part(self) -> Part:
        """By a hash of the name: 2 % held out, 1 % for validation, the rest to train on."""
        digest = hashlib.sha256(f"{self.source}/{self.name}".encode()).digest()
        number = int.from_bytes(digest[:4], "big") % 100
        return "held_out" if number < 2 else "validation" if number == 2 else "train"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents in a fixed order."""

    sources: tuple[Source, ...]
    documents: tuple[Document, ...]

    def texts(self, part: Part, source: str | None = None) -> list[str]:
        return [
            document.text
            for document in self.documents
            if document.part == part and source in (None, document.source)
        ]

    def describe(self) -> list[dict[str, object]]:
        """Each source with licence, notice, packages, and size and SHA-256 of each part."""
        described: list[dict[str, object]] = []
        for source in self.sources:
            parts: dict[str, object] = {}
            for part in PARTS:
                data = "".join(self.texts(part, source.name)).encode()
                parts[part] = {
                    "documents": len(self.texts(part, source.name)),
                    "bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            described.append(
                {
                    "name": source.name,
                    "licence": source.licence,
                    "notice": source.notice,
                    "packages": [
                        {"name": p.name, "version": p.version, "sha256": p.sha256}
                        for p in source.packages
                    ],
                    **parts,
                }
            )
        return described


def build_corpus(cache: Path, sources: Sequence[Source] = SOURCES) -> Corpus:
    """Read all sources; packages are fetched into `cache` and unpacked there.

    Raises:
        CorpusError: a source is missing, or its package is not the recorded one; or `cache` cannot
            be written to.
    """
    cache = cache.absolute()  # tools that read packages run in directories of their own
    documents: list[Document] = []
    for source in sources:
        root = unpack(source.packages, cache)
        documents += [Document(source.name, *item) for item in sorted(source.read(root).items())]
    return Corpus(tuple(sources), tuple(documents))
