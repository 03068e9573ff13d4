"""A demo model is made in one go or in parts, and what is on disk is what the card says."""

import dataclasses
import json
import lzma
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from models import load_model
from models.bits_per_byte import bits_per_byte
from models.checkpoints.history import Step, read_history, write_history
from models.checkpoints.loader import check_checkpoint
from models.checkpoints.writer import save_model
from models.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    TrainingError,
)
from models.heads.convert import convert
from models.heads.low_rank import factorise
from models.tokenizer import Tokenizer
from models.train import demo as demo_module
from models.train.config import TrainConfig
from models.train.corpus import Corpus, Document
from models.train.demo import DemoPaths, demo_config, make_demo
from models.train.sources import STANDARD_LIBRARY
from models.train.tokenizer import train_tokenizer
from models.transformer import Transformer
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 12
CORPUS = Corpus(
    (STANDARD_LIBRARY,),
    tuple(Document(STANDARD_LIBRARY.name, f"{index}.py", TEXT[index:]) for index in range(200)),
)
MACHINE: dict[str, str | int] = {
    "cpu": "2 x some", "cpu_capability": "AVX2", "threads": 2, "device": "cpu", "torch": "2",
    "python": "3",
}  # fmt: skip
CONFIG = TrainConfig(60 * 64, batch_tokens=64, seq_len=16, final_seq_len=32, seed=3)


@pytest.fixture(scope="module", autouse=True)
def _small_model() -> object:
    """The shape of the demo model is checked by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            demo_module,
            "demo_config",
            lambda size: tiny.llama(
                vocab_size=size, max_position_embeddings=64, eos_token_ids=(1,)
            ),
        )
        yield


def make(
    paths: DemoPaths,
    *,
    corpus: Corpus = CORPUS,
    config: TrainConfig = CONFIG,
    num_steps: int | None = None,
    command: str = "headroom train-demo --output here",
) -> float | None:
    steps: list[int] = []
    return make_demo(
        paths,
        corpus,
        config,
        command=command,
        machine=MACHINE,
        on_step=lambda now: steps.append(now.step),
        should_stop=lambda: len(steps) == num_steps,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    directory = tmp_path_factory.mktemp("made")
    bpb = make(DemoPaths(directory / "small", directory / "work"))
    assert bpb is not None
    return directory / "small", bpb


Made = tuple[Path, float]


def test_the_directory_loads_in_float32_and_stores_half(made: Made) -> None:
    directory, _ = made
    model = load_model(directory)
    assert check_checkpoint(directory) == model.config
    assert (model.config.name, model.config.dtype) == ("small", "float32")
    assert model.config.vocab_size == Tokenizer.for_model(directory, model.config).vocab_size
    fields = json.loads((directory / "config.json").read_text())
    assert [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [0, 1, 2]
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_measured_bits_are_those_of_the_written_model(made: Made) -> None:
    directory, bpb = made
    tokenizer = Tokenizer.from_directory(directory)
    measured = bits_per_byte(load_model(directory), tokenizer, CORPUS.texts("held_out"))
    assert measured == pytest.approx(bpb, rel=1e-6)


def test_the_card_says_what_was_measured(made: Made) -> None:
    directory, bpb = made
    card = (directory / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"| **this model** | **{bpb:.3f}** |" in card
    assert f"value: {bpb:.3f}\n" in card
    assert "`h4kv2d8`" in card
    assert "0.00 M tokens in 60 steps of 64, " in card
    data = "".join(CORPUS.texts("held_out")).encode()
    xz = 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    assert f", {xz:.3f} |" in card
    assert "headroom train-demo --output here" in card
    assert "Missed: the induction score is 0." in card
    assert "| teacher | none |" in card
    assert "held-out documents of python-standard-library\n" in card
    assert "FFN 40, separate embeddings |" in card
    assert "Retrieval was not measured" in card, "contexts of 64 have no room"
    assert "{" not in card, "every blank is filled"
    (result,) = ModelCard.load(directory / "MODEL_CARD.md").data.eval_results
    assert (result.metric_type, result.metric_value) == ("bits_per_byte", round(bpb, 3))


def test_what_belongs_to_the_model_lies_beside_it(made: Made) -> None:
    directory, _ = made
    assert sorted(path.name for path in directory.iterdir()) == [
        "MODEL_CARD.md", "config.json", "corpus.json", "history.json", "loss.svg",
        "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((directory / "corpus.json").read_text()) == CORPUS.describe()


def test_parts_make_the_same_model(made: Made, tmp_path: Path) -> None:
    paths = DemoPaths(tmp_path / "small", tmp_path / "work")
    assert make(paths, num_steps=20) is None
    assert not paths.output.exists()
    assert make(paths) == made[1]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (paths.output / name).read_bytes() == (made[0] / name).read_bytes()


def test_another_text_is_refused(tmp_path: Path) -> None:
    paths = DemoPaths(tmp_path / "small", tmp_path / "work")
    make(paths, num_steps=1)
    other = Corpus(CORPUS.sources, CORPUS.documents[:150])
    with pytest.raises(
        TrainingError, match=r"the training in .*work began with another text; allowed: the same"
    ):
        make(paths, corpus=other)


def test_a_corpus_without_a_part_is_refused(tmp_path: Path) -> None:
    train_only = tuple(d for d in CORPUS.documents if d.part == "train")
    with pytest.raises(CorpusError, match="no document of the corpus is in the part 'validation'"):
        make(
            DemoPaths(tmp_path / "small", tmp_path / "work"),
            corpus=Corpus(CORPUS.sources, train_only),
        )


def test_a_model_can_go_on_from_another(made: Made, tmp_path: Path) -> None:
    directory, bpb = made
    further = make(DemoPaths(tmp_path / "further", tmp_path / "work", start=directory))
    assert further is not None
    assert further < bpb
    card = (tmp_path / "further/MODEL_CARD.md").read_text(encoding="utf-8")
    assert "was made of `small` and then has read python-standard-library" in card
    tokenizers = [
        (path / "tokenizer.json").read_text() for path in (directory, tmp_path / "further")
    ]
    assert tokenizers[0] == tokenizers[1]
    with pytest.raises(CheckpointError, match=r"none is not a directory that holds a model"):
        make(DemoPaths(tmp_path / "third", tmp_path / "work 3", start=tmp_path / "none"))


def test_a_card_tells_all_that_was_done(made: Made, tmp_path: Path) -> None:
    directory, _ = made
    start = shutil.copytree(directory, tmp_path / "start")
    step = Step("start", "headroom convert --model small --kv-heads 2 --output start")
    write_history(start, [*read_history(directory), step])
    paths = DemoPaths(tmp_path / "further", tmp_path / "work", start, teacher=directory)
    rate = dataclasses.replace(CONFIG, learning_rate=5e-4, distillation=0.5)
    make(paths, config=rate, command="headroom train-demo --start start --output further")
    card = (paths.output / "MODEL_CARD.md").read_text(encoding="utf-8")
    commands = [
        "headroom train-demo --output here",
        "headroom convert --model small --kv-heads 2 --output start",
        "headroom train-demo --start start --output further",
    ]
    assert "\n".join(("```sh", *commands, "```")) in card
    assert [step.command for step in read_history(paths.output)] == commands
    assert "in 60 steps of 64, seed 3; 0.01 M in all trainings together |" in card
    where = (
        r"\| 2 x some \(AVX2\), threads: 2, no GPU, products in b?float(16|32), torch 2, Python 3 "
    )
    for name, learning_rate in (("small", "0.002"), ("further", "0.0005")):
        assert re.search(rf"\| `{name}` \| 0\.00 M \| {learning_rate} \| \d+ {where}\|", card)


def test_a_history_that_cannot_be_read_is_named_before_training(made: Made, tmp_path: Path) -> None:
    start = shutil.copytree(made[0], tmp_path / "start")
    (start / "history.json").write_text('[{"name": "start"}]')
    with pytest.raises(CheckpointError, match=r"start/history\.json is no history of a model"):
        make(DemoPaths(tmp_path / "small", tmp_path / "work", start))
    assert not (tmp_path / "work").exists()


def test_another_model_at_the_path_of_the_start_is_refused(made: Made, tmp_path: Path) -> None:
    start = shutil.copytree(made[0], tmp_path / "start")
    paths = DemoPaths(tmp_path / "small", tmp_path / "work", start)
    assert make(paths) is not None
    config = load_model(start).config
    layers = tuple(dataclasses.replace(heads, num_kv_heads=1) for heads in config.layers)
    for other in (config, config.replace(layers=layers)):
        save_model(tiny.model(other), start)
        with pytest.raises(TrainingError, match="began with another model to start from; allowed"):
            make(paths)
    shutil.copytree(made[0], start, dirs_exist_ok=True)
    assert make(paths) is not None, "the same content again"


def test_what_could_not_be_saved_is_refused_before_training(made: Made, tmp_path: Path) -> None:
    start = shutil.copytree(made[0], tmp_path / "start")
    fields = json.loads((start / "config.json").read_text())
    fields |= {"model_type": "mistral", "sliding_window": 8}
    (start / "config.json").write_text(json.dumps(fields))
    paths = DemoPaths(tmp_path / "small", tmp_path / "work", start)
    with pytest.raises(ConfigError, match="family is 'mistral'; allowed: llama"):
        make(paths)
    assert not paths.state_file.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "history.json", "MODEL_CARD.md"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    made: Made, tmp_path: Path, name: str
) -> None:
    paths = DemoPaths(tmp_path / "small", tmp_path / "work")
    paths.output.mkdir()
    (paths.output / name).symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"small cannot be written to: .*learned is in .*work"):
        make(paths)
    (paths.output / name).unlink()
    assert make(paths) == made[1]


def test_a_model_with_heads_of_its_own_in_each_layer_and_a_rank_learns_from_a_teacher(
    made: Made, tmp_path: Path
) -> None:
    directory, _ = made
    model = load_model(directory)
    ids = torch.randint(3, 200, (4, 16), generator=torch.Generator().manual_seed(0))
    start = tmp_path / "start"
    save_model(factorise(convert(model, [2, 1], [ids]).model, 8, [ids]), start)
    shutil.copyfile(directory / "tokenizer.json", start / "tokenizer.json")
    config = dataclasses.replace(CONFIG, distillation=0.5)
    paths = DemoPaths(tmp_path / "small", tmp_path / "work", start, directory)
    assert make(paths, config=config, num_steps=5) is None
    other = shutil.copytree(directory, tmp_path / "other")
    save_model(tiny.model(model.config), other)
    with pytest.raises(TrainingError, match="began with another teacher; allowed: the same pack"):
        make(dataclasses.replace(paths, teacher=other), config=config)
    assert make(paths, config=config) is not None
    trained = load_model(paths.output).config
    assert [heads.num_kv_heads for heads in trained.layers] == [2, 1]
    assert trained.projection_rank == 8
    card = (paths.output / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| teacher | `small`, its divergence 50% of the loss |" in card
    # How the start came to be nobody has written down.
    assert [step.name for step in read_history(paths.output)] == ["small", "small"]


def test_a_teacher_with_other_tokens_is_refused(made: Made, tmp_path: Path) -> None:
    teacher = shutil.copytree(made[0], tmp_path / "teacher")
    train_tokenizer(["other text"], 280).save(str(teacher / "tokenizer.json"))
    paths = DemoPaths(tmp_path / "small", tmp_path / "work", teacher=teacher)
    with pytest.raises(
        ConfigError, match=r"vocabulary of the teacher is .*allowed: that of the mod"
    ):
        make(paths, config=dataclasses.replace(CONFIG, distillation=0.5))


def test_the_demo_has_the_size_that_it_claims() -> None:
    with torch.device("meta"):
        model = Transformer(demo_config())
    assert model.num_parameters == pytest.approx(5.07e6, rel=0.01)
    assert model.config.layers[0].kind == "mha"


def test_an_output_that_cannot_be_written_to_loses_nothing(made: Made, tmp_path: Path) -> None:
    paths = DemoPaths(tmp_path / "small", tmp_path / "work")
    paths.output.write_text("a file")
    with pytest.raises(TrainingError, match=r"small cannot be written to: .*learned is in .*work"):
        make(paths)
    paths.output.unlink()
    assert make(paths) == made[1]
