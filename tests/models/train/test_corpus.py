"""The corpus is split the same way everywhere, and says what it is made of."""

import hashlib
import sysconfig
from pathlib import Path

import pytest

from models.errors import CorpusError
from models.train.corpus import PARTS, Corpus, build_corpus
from models.train.sources import SOURCES, STANDARD_LIBRARY
from tests.models.train.packages import with_packages


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("none"), (STANDARD_LIBRARY,))


def test_all_parts_of_the_standard_library_hold_text(corpus: Corpus) -> None:
    num_files = len(corpus.documents)
    assert num_files > 300
    assert 0.005 < len(corpus.texts("held_out")) / num_files < 0.06, "about 2 %"
    assert 0.002 < len(corpus.texts("validation")) / num_files < 0.04, "about 1 %"
    assert sum(map(len, corpus.texts("held_out"))) > 10_000
    assert 4e6 < sum(map(len, corpus.texts("train"))) < 40e6
    assert sum(len(corpus.texts(part)) for part in PARTS) == num_files


def test_no_text_is_in_two_parts(corpus: Corpus) -> None:
    # Empty package files are alike and teach nothing.
    train, validation, held_out = ({t for t in corpus.texts(p) if t.strip()} for p in PARTS)
    assert not train & held_out
    assert not train & validation
    assert not validation & held_out


def test_the_corpus_is_the_same_every_time(corpus: Corpus, tmp_path: Path) -> None:
    again = build_corpus(tmp_path, (STANDARD_LIBRARY,))
    assert again.documents == corpus.documents
    assert again.describe() == corpus.describe()


def test_every_source_is_read_once_and_no_test_is(corpus: Corpus) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    everything = [document.text for document in corpus.documents]
    for module in ("argparse.py", "asyncio/tasks.py", "json/decoder.py"):
        assert everything.count((root / module).read_text(encoding="utf-8")) == 1
    for skipped in ("site-packages", "test", "idlelib/idle_test"):
        texts = (
            file.read_text(encoding="utf-8", errors="replace")
            for file in sorted((root / skipped).rglob("*.py"))[:20]
            if file.stat().st_size > 1000
        )
        assert not set(texts) & set(everything)
    assert not [d.name for d in corpus.documents if "_sysconfigdata" in d.name]


def test_the_description_has_licence_size_and_digest_of_each_part(corpus: Corpus) -> None:
    (described,) = corpus.describe()
    assert described["licence"] == "PSF-2.0"
    assert "Python Software Foundation" in str(described["notice"])
    for part in PARTS:
        data = "".join(corpus.texts(part)).encode()
        assert described[part] == {
            "documents": len(corpus.texts(part)),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def test_packages_are_read_as_documents(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        corpus = build_corpus(cache, sources)
    texts = {d.name: d.text for d in corpus.documents}
    assert [source.name for source in corpus.sources] == [s.name for s in SOURCES[1:]]
    assert texts["library/json.rst.txt"] == "JSON\n====\n"
    assert "library/json.html" not in texts
    assert texts["adv/000000"] == "con brio, with fire: with liveliness or spirit\n"
    assert texts["Ge1"] == "Ge1:1 In the beginning.\nGe1:2 And the earth.\n"
    assert sum(d.source == "king-james-bible" for d in corpus.documents) == 1189


def test_packages_may_lie_at_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with with_packages(tmp_path) as (cache, sources):
        relative = build_corpus(cache.relative_to(tmp_path), sources)
        assert relative.documents == build_corpus(cache, sources).documents
    assert (cache / "root/usr/bin/bible").is_file()


def test_a_directory_that_cannot_hold_packages_is_named(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        cache.write_text("a file")
        with pytest.raises(CorpusError, match=r"/cache cannot hold packages: .*File exists"):
            build_corpus(cache, sources)


def test_a_bible_with_missing_chapters_is_refused(tmp_path: Path) -> None:
    with (
        with_packages(tmp_path, num_chapters=1100) as (cache, sources),
        pytest.raises(CorpusError, match="printed 1100 chapters; allowed: the 1189"),
    ):
        build_corpus(cache, sources)


def test_a_package_without_its_files_is_refused(tmp_path: Path) -> None:
    with with_packages(tmp_path) as (cache, sources):
        build_corpus(cache, sources)
        (cache / "root/usr/share/wordnet/data.noun").unlink()
        with pytest.raises(CorpusError, match=r"data\.noun is missing, which its package should"):
            build_corpus(cache, sources)
