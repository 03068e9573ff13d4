"""A trained model in numbers: bits per byte of held-out text, and what its heads do."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from tokenizers import Tokenizer as Backend

from models.bits_per_byte import bits_per_byte
from models.heads.inputs import attention_weights
from models.heads.metrics import (
    induction_score,
    previous_token_score,
    repeat_losses,
    sink_score,
)
from models.tokenizer import Tokenizer
from models.train.corpus import Corpus
from models.train.evaluate import compressors_bits_per_byte, xz_after_training_text
from models.train.trainer import repeat_probe
from models.transformer import Transformer

NUM_PROBES = 16


@dataclass(frozen=True, slots=True)
class BestHead:
    """The head with the highest score."""

    layer: int
    head: int
    score: float

    def __str__(self) -> str:
        return f"{self.score:.3f} (layer {self.layer}, head {self.head})"


@dataclass(frozen=True, slots=True)
class Measured:
    """A trained model in numbers.

    Attributes:
        by_source: held-out bits per byte of each source.
        compressors: of the same files behind one another.
        xz_after_training: bits per byte that these files add to an xz file of the training text.
        repeat_losses: nats per token of the first and second half of random tokens that come twice.
        ablated: loss of the second half without the best induction head.
        others_ablated: the same without another head; the mean over all of them, each alone.
    """

    shape: Transformer
    bits_per_byte: float
    by_source: dict[str, float]
    compressors: dict[str, float]
    xz_after_training: float
    induction: BestHead
    previous_token: BestHead
    sink: BestHead
    repeat_losses: tuple[float, float]
    ablated: float
    others_ablated: float


def measure(model: Transformer, backend: Backend, corpus: Corpus) -> Measured:
    """Everything that the card says of a model, on held-out text and on random tokens."""
    tokenizer = Tokenizer(backend)
    held_out = corpus.texts("held_out")
    texts = {source.name: corpus.texts("held_out", source.name) for source in corpus.sources}
    sizes = {name: sum(len(text.encode()) for text in part) for name, part in texts.items()}
    by_source = {
        name: bits_per_byte(model, tokenizer, part) for name, part in texts.items() if sizes[name]
    }
    total = sum(bits * sizes[name] for name, bits in by_source.items()) / sum(sizes.values())
    probe = repeat_probe(model, seed=1, batch=NUM_PROBES).to(model.device)
    period = (probe.shape[1] - 1) // 2
    weights = attention_weights(model, probe[:, :-1])
    induction = _best([induction_score(layer, period) for layer in weights])
    others = [
        (layer, head)
        for layer, heads in enumerate(model.config.layers)
        for head in range(heads.num_heads)
        if (layer, head) != (induction.layer, induction.head)
    ]
    without_other = [repeat_losses(model, probe, [place])[1] for place in others]
    return Measured(
        shape=model,
        bits_per_byte=total,
        by_source=by_source,
        compressors=compressors_bits_per_byte(held_out),
        xz_after_training=xz_after_training_text(corpus.texts("train"), held_out),
        induction=induction,
        previous_token=_best([previous_token_score(layer) for layer in weights]),
        sink=_best([sink_score(layer) for layer in weights]),
        repeat_losses=repeat_losses(model, probe),
        ablated=repeat_losses(model, probe, [(induction.layer, induction.head)])[1],
        others_ablated=fmean(without_other),
    )


def _best(scores: Sequence[torch.Tensor]) -> BestHead:
    layer = max(range(len(scores)), key=lambda index: float(scores[index].max()))
    head = int(scores[layer].argmax())
    return BestHead(layer, head, float(scores[layer][head]))
