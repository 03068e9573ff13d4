"""The models that all of them serve: 12 query heads, random weights."""

import json
from pathlib import Path

from loadtests.checkpoints import write_random_checkpoint
from service.bench import BenchShape

VOCAB_SIZE = 32_000


def shape_of(kv_heads: int, layers: int) -> BenchShape:
    """110 M parameters with 12 layers and 12 key/value heads.

    Raises:
        ValueError: so many key/value heads do not divide the query heads.
    """
    if 12 % kv_heads:
        raise ValueError(f"kv_heads has {kv_heads}; allowed: a divisor of 12")
    return BenchShape(
        layers=layers, hidden=768, intermediate=2048, heads=12, kv_heads=kv_heads, head_dim=64,
        vocab=VOCAB_SIZE, dtype="bfloat16",
    )  # fmt: skip


def random_checkpoint(shape: BenchShape, max_len: int, folder: Path) -> Path:
    """The directory of a checkpoint, written unless it is there."""
    name = f"{shape.layers}x{shape.heads}kv{shape.kv_heads}-{max_len}"
    path = folder / "checkpoints" / name
    if not path.exists():
        write_random_checkpoint(shape.model_config(max_len), path)
        # CTranslate2 wants these to have names; all prompts are ids, and nothing ends early.
        names = {f"{role}_token": "a" for role in ("bos", "eos", "unk")}
        fields = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (path / "tokenizer_config.json").write_text(json.dumps(fields))
    return path
