"""What model cards say, against the reader of the Hugging Face Hub."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from loadtests.sweep.quality import read_quality
from models.checkpoints.bundled import BUNDLED_MODELS

DEMO = BUNDLED_MODELS["demo"]


def test_the_demo_card_says_to_the_hub_what_it_says_to_us() -> None:
    (result,) = ModelCard.load(DEMO / "MODEL_CARD.md").data.eval_results
    assert result.metric_type == "bits_per_byte"
    assert read_quality(DEMO) == {
        "bits_per_byte": result.metric_value,
        "dataset": result.dataset_name,
        "card": "MODEL_CARD.md",
    }
    assert f"**{result.metric_value:.3f}**" in (DEMO / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\nlicense: mit\n---\n",
        "---\n[not, a, mapping]\n---\n",
        "---\n: {\n---\n",
        "---\nmodel-index:\n- results:\n  - metrics: [{type: accuracy, value: 1}]\n---\n",
        "---\nmodel-index:\n- results:\n  - metrics: [{type: bits_per_byte, value: low}]\n---\n",
        "---\nmodel-index: 3\n---\n",
    ],
)
def test_a_card_that_does_not_say_it_says_nothing(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_quality(tmp_path) is None


def test_a_directory_without_card_says_nothing(tmp_path: Path) -> None:
    assert read_quality(tmp_path) is None
