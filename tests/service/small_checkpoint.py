"""A small checkpoint with its tokenizer, and a text beside it, for commands that change
checkpoints."""

from pathlib import Path

from models.checkpoints.writer import save_model
from models.config import HeadConfig
from models.train.tokenizer import train_tokenizer
from models.transformer import random_model
from tests.models import tiny

TEXT = "".join(f"line {index} of a text that is read by heads\n" for index in range(200))


def write_checkpoint(directory: Path, heads: HeadConfig, *, hidden_size: int) -> Path:
    """Two layers of such heads, random weights, in `directory/model`, and `directory/text.txt`."""
    tokenizer = train_tokenizer([TEXT], 300)
    vocab_size = tokenizer.get_vocab_size()
    config = tiny.llama(layers=(heads,) * 2, vocab_size=vocab_size, hidden_size=hidden_size)
    model = directory / "model"
    save_model(random_model(config, seed=0), model)
    tokenizer.save(str(model / "tokenizer.json"))
    (directory / "text.txt").write_text(TEXT)
    return model
