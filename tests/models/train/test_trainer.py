"""Training learns, is decided by its seed, and goes on as if it had not been interrupted."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.config import ModelConfig
from models.errors import ConfigError, TrainingError
from models.heads.fidelity import compare
from models.train import trainer
from models.train.config import TrainConfig
from models.train.head_options import HeadSimilarity
from models.train.rows import IGNORED, Rows
from models.train.state import Point
from models.train.tokenizer import encode_documents, train_tokenizer
from models.train.trainer import TrainProgress, train
from models.transformer import Transformer, random_model
from tests.models import tiny

TEXT = "the cat sat on the mat; the dog — größer — lay on the log.\n" * 12
QUICK = TrainConfig(num_tokens=40 * 128, batch_tokens=128, seq_len=16, final_seq_len=32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 290)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Rows:
    tokens = encode_documents(tokenizer, [TEXT, TEXT, TEXT])
    return Rows(tokens, tokenizer, seed=0, repeat_share=0.1, needle_share=0.02)


def config_for(rows: Rows, **changes: object) -> ModelConfig:
    return tiny.llama(vocab_size=rows.tokenizer.get_vocab_size()).replace(**changes)


def learn(
    rows: Rows,
    directory: Path,
    config: TrainConfig = QUICK,
    *,
    stop_after: int | None = None,
    model: Transformer | None = None,
    teacher: Transformer | None = None,
) -> tuple[Transformer, list[Point] | None, list[TrainProgress]]:
    model = model or random_model(config_for(rows), seed=0)
    progress: list[TrainProgress] = []
    points = train(
        model,
        rows,
        validation_of(rows),
        config,
        state_file=directory / "state.safetensors",
        on_step=progress.append,
        should_stop=lambda: len(progress) == stop_after,
        teacher=teacher,
    )
    return model, points, progress


def validation_of(rows: Rows) -> Tensor:
    return rows.tokens[:48].long().view(3, 16)


def equal(one: Transformer, other: Transformer) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_lowers_all_losses(rows: Rows, tmp_path: Path) -> None:
    config = dataclasses.replace(QUICK, num_tokens=100 * 128, learning_rate=3e-3)
    model, points, progress = learn(rows, tmp_path, config)
    assert points is not None
    assert progress[0].loss == pytest.approx(math.log(model.config.vocab_size), rel=0.2)
    assert points[-1].loss < 0.3 * points[0].loss
    assert points[-1].validation_loss < 0.3 * points[0].validation_loss
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_progress_and_points_count_steps(rows: Rows, tmp_path: Path) -> None:
    config = dataclasses.replace(QUICK, num_tokens=85 * 128)
    _, points, progress = learn(rows, tmp_path, config)
    assert points is not None
    assert [now.step for now in progress] == list(range(1, 86))
    assert [point.step for point in points] == [*range(2, 85, 2), 85]
    assert [now.point for now in progress if now.point is not None] == points
    losses = [now.loss for now in progress]
    assert points[0].loss == pytest.approx((losses[0] + losses[1]) / 2)
    assert points[-1].loss == pytest.approx(losses[-1])
    assert progress[-1].seconds_left == 0
    assert progress[9].tokens_per_second == pytest.approx(
        128 * 75 / progress[9].seconds_left, rel=1e-6
    )


@pytest.mark.parametrize(
    "changes",
    [{}, {"head_dropout": 0.3, "head_temperature": True}, {"distillation": 0.5}],
    ids=["plain", "options", "teacher"],
)
def test_an_interrupted_training_ends_like_a_whole_one(
    rows: Rows, tmp_path: Path, changes: dict[str, float]
) -> None:
    config = dataclasses.replace(QUICK, **changes)  # type: ignore[arg-type]
    teacher = tiny.model(config_for(rows)) if config.distillation else None
    whole, points, _ = learn(rows, tmp_path / "whole", config, teacher=teacher)
    torch.manual_seed(5)
    _, nothing, first = learn(rows, tmp_path / "parts", config, stop_after=7, teacher=teacher)
    assert nothing is None
    # The first weights of the second part do not matter.
    other = random_model(config_for(rows), seed=9)
    resumed, again, second = learn(rows, tmp_path / "parts", config, model=other, teacher=teacher)
    assert [len(first), len(second)] == [7, 33]
    assert equal(whole, resumed)
    assert points is not None
    assert again is not None
    for one, two in zip(points, again, strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(two, seconds=0.0)
    assert [p.seconds for p in again] == sorted(p.seconds for p in again)


def test_the_seed_decides_the_result(rows: Rows, tmp_path: Path) -> None:
    first, *_ = learn(rows, tmp_path / "1")
    torch.manual_seed(7)
    again, *_ = learn(rows, tmp_path / "2")
    other, *_ = learn(dataclasses.replace(rows, seed=2), tmp_path / "3")
    assert equal(first, again)
    assert not equal(first, other)


def test_every_parameter_is_trained(rows: Rows, tmp_path: Path) -> None:
    config = config_for(rows, qkv_bias=True, output_bias=True, mlp_bias=True)
    model = random_model(config, seed=0)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    learn(rows, tmp_path, model=model)
    after = model.state_dict()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert all(parameter.isfinite().all() for parameter in after.values())


def test_running_layers_again_changes_nothing(rows: Rows, tmp_path: Path) -> None:
    config = dataclasses.replace(QUICK, head_dropout=0.3)
    kept, *_ = learn(rows, tmp_path / "kept", config)
    again, *_ = learn(rows, tmp_path / "again", dataclasses.replace(config, recompute=True))
    assert equal(kept, again)


def test_heads_can_be_pulled_apart(rows: Rows, tmp_path: Path) -> None:
    means = []
    for diversity in (0.0, 1.0):
        config = dataclasses.replace(QUICK, head_diversity=diversity)
        model, *_ = learn(rows, tmp_path / str(diversity), config)
        similarity = HeadSimilarity()
        model.forward_dense(validation_of(rows), edit=similarity)
        means.append(float(similarity.mean))
    assert means[1] < means[0] - 0.05


def test_a_model_comes_nearer_to_its_teacher(rows: Rows, tmp_path: Path) -> None:
    teacher = tiny.model(config_for(rows), seed=3)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = random_model(config_for(rows), seed=0)
    batch = [validation_of(rows)]
    first = compare(teacher, student, batch).kl
    config = dataclasses.replace(QUICK, distillation=1.0, learning_rate=1e-2)
    learn(rows, tmp_path, config, model=student, teacher=teacher)
    assert compare(teacher, student, batch).kl < 0.8 * first
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_step_follows_the_mean_of_text_and_teacher(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "has_bfloat16", lambda device: False)
    teacher, student = (tiny.model(config_for(rows), seed=seed) for seed in (3, 4))
    config = dataclasses.replace(QUICK, distillation=0.25)
    inputs, targets = rows.at(0, 8, 16)
    expected = copy.deepcopy(student).requires_grad_(True)
    logs = expected.project_to_vocab(expected.forward_dense(inputs)).log_softmax(dim=-1)
    known = targets != IGNORED
    likely = teacher.logits(inputs).clone().softmax(dim=-1)
    text = -logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0][known].mean()
    taught = (likely * (likely.log() - logs)).sum(dim=-1)[known].mean()
    (0.75 * text + 0.25 * taught).backward()
    student.requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    loss = trainer._step(student, teacher, optimizer, (inputs, targets), config, 0)
    assert float(loss) == pytest.approx(float(text.detach()), rel=1e-5)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    for one, other in zip(student.parameters(), expected.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_a_gpu_is_told_to_sum_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, (name, value) = torch.device("cuda"), trainer.REPRODUCIBLE_PRODUCTS
    monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(TrainingError, match=f"{name} is not set; allowed: {value}"),
        trainer._reproducible(gpu),
    ):
        pass
    monkeypatch.setenv(name, value)
    before = torch.get_deterministic_debug_mode()

    def fail() -> None:
        with trainer._reproducible(gpu):
            assert torch.are_deterministic_algorithms_enabled()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert torch.get_deterministic_debug_mode() == before
    with trainer._reproducible(torch.device("cpu")):
        assert torch.get_deterministic_debug_mode() == before


def test_gradients_are_clipped(rows: Rows) -> None:
    model = tiny.model(config_for(rows)).requires_grad_(True)
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(50.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer._step(model, None, optimizer, rows.at(0, 8, 16), QUICK, 0)
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(1.0, rel=1e-3)


def test_a_state_of_another_shape_is_refused(rows: Rows, tmp_path: Path) -> None:
    learn(rows, tmp_path, stop_after=2)
    other = random_model(config_for(rows, hidden_size=32), seed=0)
    with pytest.raises(TrainingError, match=r"state\.safetensors holds a model of another shape"):
        learn(rows, tmp_path, model=other)


def test_the_rate_warms_up_and_ends_at_a_tenth(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        assert self.param_groups[1]["lr"] == rates[-1]
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    config = TrainConfig(
        100 * 16, batch_tokens=16, seq_len=16, final_seq_len=16, learning_rate=1e-2,
        warmup_share=0.1,
    )  # fmt: skip
    learn(rows, tmp_path, config)
    assert len(rates) == 100
    assert rates[:10] == pytest.approx([1e-3 * (i + 1) for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(5.5e-3), "half of the cosine"
    assert rates[-1] == pytest.approx(1e-3)


def test_rows_are_longer_at_the_end(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    at = Rows.at

    def record(
        self: Rows, step: int, num_rows: int, seq_len: int, difficulty: float
    ) -> tuple[Tensor, Tensor]:
        shapes.append((num_rows, seq_len))
        return at(self, step, num_rows, seq_len, difficulty)

    monkeypatch.setattr(Rows, "at", record)
    learn(rows, tmp_path)
    assert shapes == [(8, 16)] * 34 + [(4, 32)] * 6


def test_rows_that_do_not_fit_are_refused(rows: Rows, tmp_path: Path) -> None:
    config = TrainConfig(128, batch_tokens=128, seq_len=16, final_seq_len=128)
    with pytest.raises(ConfigError, match="seq_len is 128; allowed: up to 64"):
        learn(rows, tmp_path, config)
    short = dataclasses.replace(rows, tokens=rows.tokens[:20])
    with pytest.raises(ConfigError, match="seq_len is 32; allowed: up to 19"):
        train(
            random_model(config_for(rows), seed=0), short, validation_of(rows), QUICK,
            state_file=tmp_path / "state.safetensors", on_step=lambda _: None,
        )  # fmt: skip


def test_a_loss_that_is_no_number_ends_the_training(rows: Rows, tmp_path: Path) -> None:
    config = dataclasses.replace(QUICK, learning_rate=1e20)
    with pytest.raises(
        TrainingError, match=r"the loss of step \d+ is nan; train with a learning rate below 1e\+20"
    ):
        learn(rows, tmp_path, config)
    assert not (tmp_path / "state.safetensors").exists(), "what is broken is not kept"
