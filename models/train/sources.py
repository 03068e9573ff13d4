"""Openly licensed text that Python and Debian packages carry, as named documents."""

import re
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.errors import CorpusError
from models.train.packages import Package

Documents = dict[str, str]

_SKIPPED_PARTS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_GLOSSES_PER_DOCUMENT = 200


@dataclass(frozen=True, slots=True)
class Source:
    """Where text comes from, and on which terms.

    Attributes:
        packages: what has to be unpacked before; none for what Python itself carries.
        notice: what has to stay with copies.
        read: documents by name, from the directory that holds the packages' files.
    """

    name: str
    licence: str
    notice: str
    packages: tuple[Package, ...]
    read: Callable[[Path], Documents]


def _standard_library(_: Path) -> Documents:
    """Every UTF-8 source file of the standard library, except tests and paths of this machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: Documents = {}
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        machine_made = relative.name.startswith("_sysconfigdata")
        if machine_made or _SKIPPED_PARTS.intersection(relative.parts):
            continue
        try:
            documents[relative.as_posix()] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files are there to have another encoding
    return documents


def _python_docs(root: Path) -> Documents:
    """The reStructuredText sources of Python's documentation."""
    sources = _existing(root / "usr/share/doc/python3.11/html/_sources")
    return {
        file.relative_to(sources).as_posix(): file.read_text(encoding="utf-8")
        for file in sorted(sources.rglob("*.rst.txt"))
    }


def _bible(root: Path) -> Documents:
    """The King James Bible by chapters, each verse a line such as `Ge1:1 In the beginning`."""
    program = _existing(root / "usr/bin/bible")
    data = _existing(root / "usr/lib/bible.data")
    command = [str(program), "-f", "gen1:1-rev22:21"]
    # The program looks for its data in the current directory first.
    done = subprocess.run(command, cwd=data.parent, capture_output=True, text=True, check=False)
    chapters: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        verse = re.match(r"(\w+?\d+):\d+ ", line)
        if verse is not None:
            chapters.setdefault(verse[1], []).append(line)
    if len(chapters) != 1189:
        raise CorpusError(
            f"{program} printed {len(chapters)} chapters; allowed: the 1189 of the King James Bible"
        )
    return {name: "\n".join(lines) + "\n" for name, lines in chapters.items()}


def _wordnet(root: Path) -> Documents:
    """WordNet's glosses, each a line `words: gloss`, some hundred to a document."""
    documents: Documents = {}
    for part in ("adj", "adv", "noun", "verb"):
        file = _existing(root / f"usr/share/wordnet/data.{part}")
        lines = [
            _gloss(line)
            for line in file.read_text(encoding="utf-8").splitlines()
            if not line.startswith("  ")  # the licence
        ]
        for start in range(0, len(lines), _GLOSSES_PER_DOCUMENT):
            text = "".join(lines[start : start + _GLOSSES_PER_DOCUMENT])
            documents[f"{part}/{start:06}"] = text
    return documents


def _gloss(line: str) -> str:
    """`offset file type count word id word id ... | gloss` (wndb(5)) as `word, word: gloss`."""
    fields, _, gloss = line.partition("|")
    parts = fields.split()
    words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
    return f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}\n"


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CorpusError(f"{path} is missing, which its package should hold")
    return path


_PSF = "Copyright (c) Python Software Foundation; all rights reserved; PSF License Version 2."

STANDARD_LIBRARY = Source("python-standard-library", "PSF-2.0", _PSF, (), _standard_library)
SOURCES = (
    STANDARD_LIBRARY,
    Source(
        "python-docs",
        "PSF-2.0, examples 0BSD",
        _PSF,
        (
            Package(
                "python3.11-doc",
                "3.11.2-6+deb12u9",
                "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
            ),
        ),
        _python_docs,
    ),
    Source(
        "king-james-bible",
        "out of copyright",
        "The King James Version of 1611; the text as compiled by Chip Chapin.",
        (
            # The program that decodes the text (GPL-2+); nothing of it enters the corpus.
            Package(
                "bible-kjv",
                "4.38",
                "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
            ),
            Package(
                "bible-kjv-text",
                "4.38",
                "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
            ),
        ),
        _bible,
    ),
    Source(
        "wordnet-glosses",
        "WordNet-3.0",
        "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. THIS SOFTWARE "
        'AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR '
        "WARRANTIES, EXPRESS OR IMPLIED.",
        (
            Package(
                "wordnet-base",
                "1:3.0-37",
                "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            ),
        ),
        _wordnet,
    ),
)
