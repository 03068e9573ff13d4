"""`headroom train-demo` ends with a checkpoint, or with one clear line and nothing lost."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models.train import corpus, demo, trainer
from models.train.config import TrainConfig
from models.train.corpus import Corpus, Document
from models.train.sources import STANDARD_LIBRARY
from service.cli import app
from service.commands.train_demo import _command
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 40


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small corpus and model in place of those that take hours."""
    documents = tuple(
        Document(STANDARD_LIBRARY.name, f"{index}.py", TEXT[index:]) for index in range(200)
    )
    monkeypatch.setattr(
        corpus, "build_corpus", lambda cache, sources: Corpus((STANDARD_LIBRARY,), documents)
    )
    monkeypatch.setattr(
        demo,
        "demo_config",
        lambda size: tiny.llama(vocab_size=size, max_position_embeddings=1024, eos_token_ids=(1,)),
    )


def train(output: Path, *flags: str, tokens: str = "0.02") -> Any:
    arguments = ["train-demo", "--output", str(output), "--tokens", tokens, *flags]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_interrupted_it_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    whole = train(tmp_path / "whole" / "small")
    assert whole.exit_code == 0, whole.output
    step = trainer._step

    def interrupted(*arguments: Any) -> Any:
        loss = step(*arguments)
        if arguments[-1] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(trainer, "_step", interrupted)
    first = train(tmp_path / "small")
    assert first.exit_code == 130
    state = tmp_path / "small.training"
    assert f"error: interrupted; the state is in {state}, and the same" in first.stderr
    assert not (tmp_path / "small").exists()
    second = train(tmp_path / "small")
    assert second.exit_code == 0, second.output
    assert "bits per byte on held-out files" in second.stdout
    weights = [d / "small" / "model.safetensors" for d in (tmp_path / "whole", tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_card_has_the_command_that_makes_the_model_again(tmp_path: Path) -> None:
    flags = ["--seed", "4", "--head-dropout", "0.1", "--head-temperature", "--recompute"]
    flags += ["--repeat-growth", "0.5", "--needle-share", "0.3"]
    answer = train(tmp_path / "small", "--work", str(tmp_path / "state"), *flags, tokens="0.002")
    assert answer.exit_code == 0, answer.output
    card = (tmp_path / "small/MODEL_CARD.md").read_text(encoding="utf-8")
    expected = (
        f"headroom train-demo --output {tmp_path / 'small'} --tokens 0.002 --batch-tokens 2048 "
        "--learning-rate 0.002 --seed 4 --repeat-share 0.1 --needle-share 0.3 --repeat-growth 0.5 "
        "--head-dropout 0.1 --head-temperature --recompute\n"
    )
    assert expected in card


def test_the_command_names_the_teacher_and_its_share(tmp_path: Path) -> None:
    teacher = tmp_path / "first"
    assert train(teacher, tokens="0.002").exit_code == 0
    answer = train(tmp_path / "small", "--teacher", str(teacher), tokens="0.002")
    assert answer.exit_code == 0, answer.output
    card = (tmp_path / "small/MODEL_CARD.md").read_text(encoding="utf-8")
    assert (
        f" --seed 0 --repeat-share 0.1 --needle-share 0.02 --teacher {teacher} --distillation 0.5\n"
        in card
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--head-dropout", "1"], "head_dropout is 1.0; allowed: 0 or more, below 1"),
        (["--learning-rate", "0"], "learning_rate is 0.0; allowed: a finite number above 0"),
        (
            ["--distillation", "0.5"],
            "distillation is 0.5; allowed: above 0 with a teacher, 0 without one",
        ),
        (
            ["--start", "nowhere"],
            "nowhere is not a directory that holds a model; bundled models are demo, demo-gqa, "
            "demo-mqa, demo-pruned",
        ),
        (["--tokens", "inf"], "--tokens is inf; allowed: a finite number, in millions"),
        (["--device", "tpu"], "--device is 'tpu'; allowed: auto, cpu, cuda, cuda:N"),
        (["--device", "cuda:99"], "--device is 'cuda:99'; this machine has "),
        (["--output", "."], "--output is '.'; allowed: a directory with a name"),
        (["--output", ".."], "--output is '..'; allowed: a directory with a name"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    answer = train(tmp_path / "small", *flags)
    assert answer.exit_code == 2
    assert answer.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "small").exists()


def test_the_seed_changes_the_result(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        assert train(tmp_path / name, "--seed", seed, tokens="0.005").exit_code == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_model_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train(other, tokens="0.002").exit_code == 0
    weights = (other / "model.safetensors").read_bytes()
    elsewhere = train(other, "--work", str(tmp_path / "state"), "--seed", "1", tokens="0.002")
    assert elsewhere.exit_code == 2
    assert elsewhere.stderr == (
        f"error: --output is {other}, which holds a model; allowed: another directory\n"
    )
    assert not (tmp_path / "state").exists()
    finished = train(other, tokens="0.002")
    assert finished.exit_code == 0, "with its own state it goes on, here at its end"
    another = train(other, "--seed", "1", tokens="0.002")
    assert another.exit_code == 2
    assert "seed is 1; allowed: 0, with which the training" in another.stderr
    shutil.rmtree(tmp_path / "other.training")
    assert train(other, tokens="0.002").exit_code == 2, "with no state it would begin anew"
    assert (other / "model.safetensors").read_bytes() == weights


def test_the_command_names_the_device() -> None:
    paths = demo.DemoPaths(Path("small"), Path("work"))
    config = TrainConfig(2000)
    command = _command(config, paths, minimal=True, device="cuda")
    assert command.endswith(" --repeat-share 0.1 --needle-share 0.02 --minimal --device cuda")
    assert "--device" not in _command(config, paths, minimal=True, device="cpu")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "state.partial").symlink_to("/dev/full")
    answer = train(tmp_path / "small", "--work", str(state), tokens="0.002")
    assert answer.exit_code == 2
    assert "No space left on device; there is none before it" in answer.stderr.splitlines()[-1]
