"""A trained model in numbers: bits per byte of held-out text, and what its heads do."""

from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from models.bits_per_byte import bits_per_byte
from models.heads.inputs import attention_weights
from models.heads.metrics import (
    BestHead,
    best_head,
    induction_score,
    previous_token_score,
    repeat_losses,
    sink_score,
)
from models.tokenizer import Tokenizer
from models.train.corpus import Corpus
from models.train.evaluate import compressors_bits_per_byte, xz_after_training_text
from models.train.retrieval import Retrieval, measure_retrieval
from models.train.tokenizer import encode_documents
from models.train.trainer import probe_period, repeat_probe
from models.transformer import Transformer

NUM_PROBES = 16
_SEED = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """A trained model in numbers.

    Attributes:
        by_source: held-out bits per byte of each source.
        compressors: of the same files behind one another.
        xz_after_training: bits per byte that these files add to an xz file of the training text.
        period: after which random tokens come again.
        num_induction_heads: with a score of 0.5 or more; one stands in for another.
        repeat_losses: nats per token of the first and second half of random tokens that come twice.
        without: by layer and head, how much the loss of the second half grows without it, in nats
            per token.
        retrieval: on held-out text; None where there is no room for it.
    """

    shape: Transformer
    bits_per_byte: float
    by_source: dict[str, float]
    compressors: dict[str, float]
    xz_after_training: float
    period: int
    induction: BestHead
    num_induction_heads: int
    previous_token: BestHead
    sink: BestHead
    repeat_losses: tuple[float, float]
    without: dict[tuple[int, int], float]
    retrieval: Retrieval | None

    @property
    def without_best(self) -> float:
        """How much the loss grows without the best induction head."""
        return self.without[self.induction.layer, self.induction.head]

    @property
    def without_others(self) -> dict[tuple[int, int], float]:
        """How much the loss grows without each of the other heads."""
        best = self.induction.layer, self.induction.head
        return {place: growth for place, growth in self.without.items() if place != best}


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
    probe = repeat_probe(model, seed=_SEED, batch=NUM_PROBES).to(model.device)
    period = probe_period(model)
    weights = attention_weights(model, probe[:, :-1])
    induction = [induction_score(layer, period) for layer in weights]
    losses = repeat_losses(model, probe)
    places = [
        (layer, head)
        for layer, heads in enumerate(model.config.layers)
        for head in range(heads.num_heads)
    ]
    without = {place: repeat_losses(model, probe, [place])[1] - losses[1] for place in places}
    return Measured(
        shape=model,
        bits_per_byte=total,
        by_source=by_source,
        compressors=compressors_bits_per_byte(held_out),
        xz_after_training=xz_after_training_text(corpus.texts("train"), held_out),
        period=period,
        induction=best_head(induction),
        num_induction_heads=sum(int((scores >= 0.5).sum()) for scores in induction),
        previous_token=best_head([previous_token_score(layer) for layer in weights]),
        sink=best_head([sink_score(layer) for layer in weights]),
        repeat_losses=losses,
        without=without,
        retrieval=measure_retrieval(
            model, backend, encode_documents(backend, held_out), seed=_SEED
        ),
    )
