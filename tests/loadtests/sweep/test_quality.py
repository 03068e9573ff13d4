"""Checkpoints of a sweep are measured once, on one text, and the report shows it."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtests.sweep import results as results_module
from loadtests.sweep.analysis import analyse
from loadtests.sweep.plan import Plan
from loadtests.sweep.quality import HeldOutText, measure_quality
from loadtests.sweep.report import write_report
from loadtests.sweep.results import Results, new_results, read_results
from loadtests.sweep.runner import unmeasured_checkpoints
from loadtests.sweep.source import SweepError
from models.bits_per_byte import bits_per_byte
from models.checkpoints.loader import load_model
from models.checkpoints.writer import save_model
from models.tokenizer import Tokenizer
from models.train.corpus import build_corpus
from models.train.sources import STANDARD_LIBRARY
from models.train.tokenizer import train_tokenizer
from models.transformer import random_model
from service.capacity import MachineLimits
from tests.loadtests.sweep.browser import open_page
from tests.loadtests.sweep.documents import LIMITS, SWEEP, measured, plan
from tests.models import tiny

TEXT = "the cat sat on the mat — and the dog größer on the log.\n" * 8
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with tokenizers of their own."""
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, vocab_size in enumerate((270, 290)):
        tokenizer = train_tokenizer([TEXT], vocab_size)
        config = tiny.llama(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256)
        save_model(random_model(config, seed=seed), root / f"m{seed}")
        tokenizer.save(str(root / f"m{seed}" / "tokenizer.json"))
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return [root / "m0", root / "m1"]


def sweep_of(checkpoints: list[Path], quality: str = "") -> str:
    named = "".join(f"  - {{name: {path.name}, checkpoint: {path}}}\n" for path in checkpoints)
    return SWEEP.replace("loads:", f"{named}loads:") + quality


def quality_of(checkpoints: list[Path]) -> str:
    return f"quality: {{text: {checkpoints[0].parent / 'text.txt'}, bytes: 200}}\n"


@pytest.fixture
def opened(
    checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Plan, Results]:
    limits = MachineLimits.from_dict(LIMITS)
    monkeypatch.setattr(results_module, "measure_machine", lambda _: limits)
    found = plan(sweep_of(checkpoints, quality_of(checkpoints)))
    return found, new_results(tmp_path / "sweep", found, "headroom sweep", fresh=False)


def test_every_checkpoint_is_measured_on_the_same_bytes(
    checkpoints: list[Path], opened: tuple[Plan, Results]
) -> None:
    found, results = opened
    measure_quality(unmeasured_checkpoints(found, results), found.text, results, QUIET)
    text = TEXT.encode()[:200].decode()
    for path in checkpoints:
        model = load_model(path)
        bits = bits_per_byte(model, Tokenizer.for_model(path, model.config), [text])
        assert results.document["quality"][path.name] == {
            "bits_per_byte": bits, "window": 256, "dtype": "float32",
        }  # fmt: skip
    assert set(results.document["quality"]) == {"m0", "m1"}, "random weights are not"
    assert results.document["text"]["bytes"] == 200


def test_what_is_measured_is_not_measured_again(opened: tuple[Plan, Results]) -> None:
    found, results = opened
    first, second = unmeasured_checkpoints(found, results)
    measure_quality([first], found.text, results, QUIET)
    again = read_results(results.directory, found)
    assert again is not None
    assert unmeasured_checkpoints(found, again) == [second]
    again.go_on(found)
    assert unmeasured_checkpoints(found, None) == [first, second]


def test_another_text_is_refused(checkpoints: list[Path], opened: tuple[Plan, Results]) -> None:
    found, results = opened
    with pytest.raises(SweepError, match="differs in quality"):
        read_results(results.directory, plan(sweep_of(checkpoints, "quality: {bytes: 1KiB}\n")))
    file = checkpoints[0].parent / "text.txt"
    try:
        file.write_text("another", encoding="utf-8")
        with pytest.raises(SweepError, match=r"text\.sha256 was '\w+', is '\w+'"):
            results.go_on(found)
    finally:
        file.write_text(TEXT, encoding="utf-8")


def test_by_default_it_is_what_the_demo_models_were_not_trained_on() -> None:
    documents = HeldOutText().read()
    assert documents == build_corpus(Path(), (STANDARD_LIBRARY,)).texts("held_out")
    some = HeldOutText(num_bytes=len(documents[0].encode()) + 5).read()
    assert (some[0], some[1]) == (documents[0], documents[1][:5])


def test_a_character_is_not_cut() -> None:
    assert "".join(HeldOutText(num_bytes=1).read()) != ""
    file = Path(__file__)  # which begins with quotes, and has an umlaut
    at = file.read_bytes().index("ö".encode())
    (text,) = HeldOutText(file, at + 1).read()
    assert text.encode() == file.read_bytes()[:at]


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("{text: nowhere.txt}", "18: quality.text is 'nowhere.txt': [Errno 2]"),
        ("{text: /dev/null}", "18: quality is of no text; allowed: one character or more"),
        ("{bytes: 0}", "18: quality.bytes is 0; allowed: greater than or equal to 1"),
        ("{tokens: 5}", "18: quality.tokens is not known; allowed: text, bytes"),
        ("[]", "18: quality is []; allowed: fields text, bytes"),
    ],
)
def test_mistakes_are_named(quality: str, expected: str, checkpoints: list[Path]) -> None:
    with pytest.raises(SweepError) as caught:
        plan(sweep_of(checkpoints[:1], f"quality: {quality}\n"))
    assert str(caught.value).startswith(f"sweep.yaml:{expected}")


def test_random_weights_have_no_quality() -> None:
    with pytest.raises(SweepError, match=r"17: quality is of checkpoints, of which there is none"):
        plan(f"{SWEEP}quality: {{bytes: 1KiB}}\n")
    assert unmeasured_checkpoints(plan(), None) == []


def test_the_report_shows_speed_and_loss(checkpoints: list[Path], tmp_path: Path) -> None:
    found = plan(sweep_of(checkpoints, quality_of(checkpoints)))
    document: dict[str, Any] = measured(found) | {
        "quality": {
            "m0": {"bits_per_byte": 1.2345, "window": 256, "dtype": "float32"},
            "m1": {"bits_per_byte": 2.5, "window": 256, "dtype": "float32"},
        },
        "text": found.text.describe(),
    }
    write_report(analyse(found, document), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    (row,) = (line for line in markdown.splitlines() if line.startswith("| m0 | GQA | checkpoint"))
    assert " | 1.234 | " in row or " | 1.235 | " in row
    (row,) = (line for line in markdown.splitlines() if line.startswith("| h4kv4d16 | MHA |"))
    assert " | – | " in row
    assert "Bits per byte on text.txt: 1 document, 200 bytes, SHA-256 `" in markdown
    dom, console = open_page(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert dom.count('class="plotly-graph-div js-plotly-plot"') == 7
    assert "bits per byte" in dom
