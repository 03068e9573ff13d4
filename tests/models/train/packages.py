"""Packages that carry a few lines, and the tools that fetch and unpack them."""

import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.train.packages import Package
from models.train.sources import SOURCES, Source

# A package is a script here that writes its files below the directory it is given.
_FILES = {
    "python3.11-doc": """
mkdir -p "$1/usr/share/doc/python3.11/html/_sources/library"
cd "$1/usr/share/doc/python3.11/html/_sources/library"
printf 'JSON\\n====\\n' > json.rst.txt
echo '<p>' > json.html
""",
    "bible-kjv": """
mkdir -p "$1/usr/bin"
cat > "$1/usr/bin/bible" <<'PROGRAM'
#!/bin/sh
test -f bible.data || exit 1
echo 'Ge1:1 In the beginning.'
echo 'Ge1:2 And the earth.'
seq 2 {num_chapters} | sed 's/.*/Ge&:1 Text./'
PROGRAM
chmod +x "$1/usr/bin/bible"
""",
    "bible-kjv-text": 'mkdir -p "$1/usr/lib" && : > "$1/usr/lib/bible.data"\n',
    "wordnet-base": """
mkdir -p "$1/usr/share/wordnet"
cd "$1/usr/share/wordnet"
echo '  1 This software and database is provided' > data.adv
echo '00019900 02 r 02 con_brio 0 with_fire 1 000 | with liveliness or spirit  ' >> data.adv
for part in adj noun verb; do : > data.$part; done
""",
}
_APT_GET = """#!/bin/sh
test "$1" = download || exit 1
name="${2%%=*}" version="${2#*=}"
if test ! -f "$MIRROR/$name"; then echo "E: no $2" >&2; exit 100; fi
cp "$MIRROR/$name" "./${name}_$(echo "$version" | sed 's/:/%3a/')_all.deb"
"""
_DPKG_DEB = '#!/bin/sh\nsh "$2" "$(realpath -m "$3")"\n'


@contextmanager
def with_packages(
    directory: Path, *, num_chapters: int = 1189
) -> Iterator[tuple[Path, tuple[Source, ...]]]:
    """A directory for packages, and the sources that need some; while this lasts, tools that know
    them come first in PATH."""
    mirror, tools = directory / "mirror", directory / "tools"
    for name, script in _FILES.items():
        mirror.mkdir(exist_ok=True)
        (mirror / name).write_text(script.replace("{num_chapters}", str(num_chapters)))
    for name, script in (("apt-get", _APT_GET), ("dpkg-deb", _DPKG_DEB)):
        tools.mkdir(exist_ok=True)
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    sources = tuple(
        dataclasses.replace(source, packages=tuple(_known(p, mirror) for p in source.packages))
        for source in SOURCES[1:]
    )
    before = dict(os.environ)
    os.environ["PATH"] = f"{tools}:{before['PATH']}"
    os.environ["MIRROR"] = str(mirror)
    try:
        yield directory / "cache", sources
    finally:
        os.environ.clear()
        os.environ.update(before)


def _known(package: Package, mirror: Path) -> Package:
    digest = hashlib.sha256((mirror / package.name).read_bytes()).hexdigest()
    return dataclasses.replace(package, sha256=digest)
