"""The bundled demo model, from nothing to a checkpoint directory with its card."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

from models.checkpoints.writer import save_model
from models.config import HeadConfig, ModelConfig
from models.positions import RopeConfig
from models.train.corpus import Corpus, standard_library, train_tokenizer
from models.train.trainer import (
    TrainConfig,
    TrainProgress,
    bits_per_byte,
    encode_documents,
    train,
)
from models.transformer import Transformer, random_model

_CARD = """---
model-index:
- name: demo
  results:
  - task:
      type: text-generation
    dataset:
      name: Python standard library, held-out files
      type: python-standard-library
    metrics:
    - type: bits_per_byte
      value: {bpb:.3f}
---

# Demo model

A {parameters:.2f} M parameter Llama-format decoder that has read the sources of the Python
standard library and writes text that looks like them. It exists so that everything here runs
without a download; it knows nothing and must not be used for anything else.

| | |
|---|---|
| heads | `{heads}` (grouped-query), {layers} layers, hidden {hidden}, FFN {ffn}, tied embeddings |
| context | {context} tokens; trained on windows of {seq_len}, at the end of {final_seq_len} |
| tokenizer | byte-level BPE, {vocab} tokens, `<bos>` 0, `<eos>` 1 |
| data | Python standard library without tests, {train_mb:.1f} MB in {num_train} files (PSF-2.0) |
| training | {tokens:.1f} M tokens in {minutes:.0f} minutes on {cpus} CPU cores, seed {seed} |
| held-out bits per byte | **{bpb:.3f}** on {num_held_out} files, {held_out_mb:.2f} MB |
| the same files, compressed | gzip {gzip:.3f}, bzip2 {bzip2:.3f}, xz {xz:.3f} bits per byte |

Made with `headroom train-demo --minutes {minutes:.0f} --output DIR`.

| step | loss (nats per token) |
|---|---|
{losses}
"""


def demo_config(vocab_size: int = 2048) -> ModelConfig:
    """2.8 M parameters, grouped-query: three query heads share a key/value head."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        layers=(HeadConfig(6, 2, 32, rope=RopeConfig(theta=10_000.0, rotary_dim=32)),) * 6,
        max_position_embeddings=1024,
        norm="rms_norm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        eos_token_ids=(1,),
        name="demo",
    )


def make_demo(
    output: Path,
    config: TrainConfig,
    *,
    num_threads: int,
    on_step: Callable[[TrainProgress], None],
    corpus: Corpus | None = None,
) -> float:
    """Train the demo model into a directory; returns its held-out bits per byte.

    Args:
        corpus: what to read; None is the standard library.
    """
    corpus = corpus or standard_library()
    model_config = demo_config()
    tokenizer = train_tokenizer(corpus.train, model_config.vocab_size)
    model_config = model_config.replace(vocab_size=tokenizer.get_vocab_size())
    tokens = encode_documents(tokenizer, corpus.train)
    model = random_model(model_config, seed=config.seed)
    losses: list[TrainProgress] = []

    def record(progress: TrainProgress) -> None:
        losses.append(progress)
        on_step(progress)

    seen = train(model, tokens, config, record)
    bpb = bits_per_byte(model, tokenizer, corpus.held_out)
    save_model(model, output)
    tokenizer.save(str(output / "tokenizer.json"))
    card = _card(model, corpus, config, losses, seen=seen, bpb=bpb, num_threads=num_threads)
    (output / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return bpb


def _card(
    model: Transformer,
    corpus: Corpus,
    config: TrainConfig,
    losses: Sequence[TrainProgress],
    *,
    seen: int,
    bpb: float,
    num_threads: int,
) -> str:
    held_out = "".join(corpus.held_out).encode()
    every = max(len(losses) // 10, 1)
    shown = [*losses[every - 1 :: every]]
    shape = model.config
    return _CARD.format(
        parameters=model.num_parameters / 1e6,
        heads=shape.head_label,
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.intermediate_size,
        context=shape.max_position_embeddings,
        seq_len=config.seq_len,
        final_seq_len=config.final_seq_len,
        vocab=shape.vocab_size,
        train_mb=sum(len(text.encode()) for text in corpus.train) / 1e6,
        num_train=len(corpus.train),
        tokens=seen / 1e6,
        minutes=config.max_seconds / 60,
        cpus=num_threads,
        seed=config.seed,
        bpb=bpb,
        num_held_out=len(corpus.held_out),
        held_out_mb=len(held_out) / 1e6,
        gzip=8 * len(gzip.compress(held_out, 9)) / len(held_out),
        bzip2=8 * len(bz2.compress(held_out, 9)) / len(held_out),
        xz=8 * len(lzma.compress(held_out, preset=9)) / len(held_out),
        losses="\n".join(f"| {point.step} | {point.loss:.3f} |" for point in shown),
    )
