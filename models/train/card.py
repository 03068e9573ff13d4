"""The card of a trained model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from models.train.config import TrainConfig
from models.train.corpus import Corpus
from models.train.measure import NUM_PROBES, Measured
from models.train.rows import NEEDLE_SHARE
from models.train.state import Point

_XZ_GATE = 0.85

_CARD = """---
model-index:
- name: {name}
  results:
  - task:
      type: text-generation
    dataset:
      name: held-out files of Python and Debian packages
      type: python-and-debian-packages
    metrics:
    - type: bits_per_byte
      value: {bpb:.3f}
---

# {name}

A {parameters:.2f} M parameter Llama-format decoder, small enough to be trained on two processor
cores, which {origin}. It exists so that heads can be looked at, removed and shared without a
download; it knows little and must not be used for anything else.

| | |
|---|---|
| heads | `{heads}`, {layers} layers, hidden {hidden}, FFN {ffn}, tied embeddings |
| weights | bfloat16 in the file, float32 when loaded |
| context | {context} tokens; trained on rows of {seq_len}, at the end of {final_seq_len} |
| tokenizer | byte-level BPE, {vocab} tokens, `<bos>` 0, `<eos>` 1, `<pad>` 2 |
| training | {tokens:.2f} M tokens in {steps} steps of {batch}, {minutes:.0f} minutes, seed {seed} |
| recipe | AdamW (0.9, 0.95), weight decay {decay}, rate {rate:g}, cosine to a tenth, clip 1.0 |
| options of heads | dropout {dropout:g}, diversity {diversity:g}, temperature {temperature} |
| teacher | {teacher} |
| mixed in | {mixed_in} |
| loss at the end | {loss:.3f} nats per token, validation {validation:.3f} |

![losses](loss.svg)

## Held-out text

No document is in two parts: a hash of its name decides. `corpus.json` lists sources, licences,
notices, sizes and SHA-256.

| bits per byte | |
|---|---|
| **this model** | **{bpb:.3f}** |
{by_source}
| gzip, bzip2, xz of the same files behind one another | {gzip:.3f}, {bzip2:.3f}, {xz:.3f} |
| xz, what the same files add to the training text | {xz_after:.3f} |

{gate}

## Heads

Measured on {probe} sequences of `<bos>` and 50 random tokens that come twice; layers and heads
are counted from 0.

| | | asked for |
|---|---|---|
| best induction score | {induction} | 0.8 or more |
| heads with an induction score of 0.5 or more | {num_induction} | |
| best previous-token score | {previous} | 0.5 or more |
| highest weight of the first token | {sink} | |
| loss of the first half | {first:.2f} nats per token | 5 or more |
| loss of the second half | {second:.3f} nats per token | 0.5 or less |
| without the best induction head | {ablated:+.3f} nats | |
| without another head, mean of all | {others_mean:+.4f} nats | a twentieth of that or less |
| without another head, median of all | {others_median:+.4f} nats | |
| without the head that matters most | {most} | |

{heads_verdict}

## Make it again

```sh
{command}
```

The same seed gives the same losses on the same machine with the same number of threads; the
command goes on where it was interrupted. NOTICE of the texts: see `corpus.json`.
"""


def write_card(
    output: Path,
    config: TrainConfig,
    points: Sequence[Point],
    measured: Measured,
    corpus: Corpus,
    command: str,
    origin: tuple[Path | None, Path | None],
) -> None:
    """Write MODEL_CARD.md into a directory.

    Args:
        origin: the checkpoint to start from and the teacher, if there were any.
    """
    start, teacher = origin
    shape = measured.shape.config
    first, second = measured.repeat_losses
    names = ", ".join(source.name for source in corpus.sources)
    made_of = (
        f"has read {names}"
        if start is None
        else f"was made of `{start.name}` and then has read {names}"
    )
    card = _CARD.format(
        name=output.name,
        origin=made_of,
        bpb=measured.bits_per_byte,
        parameters=measured.shape.num_parameters / 1e6,
        heads=shape.head_label,
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.intermediate_size,
        context=shape.max_position_embeddings,
        seq_len=config.seq_len,
        final_seq_len=config.final_seq_len,
        vocab=shape.vocab_size,
        tokens=config.num_steps * config.batch_tokens / 1e6,
        steps=config.num_steps,
        batch=config.batch_tokens,
        minutes=points[-1].seconds / 60,
        seed=config.seed,
        decay=config.weight_decay,
        rate=config.learning_rate,
        dropout=config.head_dropout,
        diversity=config.head_diversity,
        temperature="learned" if config.head_temperature else "none",
        teacher="none"
        if teacher is None
        else f"`{teacher.name}`, its divergence {config.distillation:.0%} of the loss",
        mixed_in=_mixed_in(config),
        loss=points[-1].loss,
        validation=points[-1].validation_loss,
        by_source="\n".join(
            f"| of it {n} | {bits:.3f} |" for n, bits in measured.by_source.items()
        ),
        **measured.compressors,
        xz_after=measured.xz_after_training,
        gate=_gate(measured),
        probe=NUM_PROBES,
        induction=measured.induction,
        num_induction=measured.num_induction_heads,
        previous=measured.previous_token,
        sink=measured.sink,
        first=first,
        second=second,
        ablated=measured.without_best,
        others_mean=fmean(measured.without_others),
        others_median=median(measured.without_others),
        most=_most(measured),
        heads_verdict=_verdict(measured),
        command=command,
    )
    (output / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _mixed_in(config: TrainConfig) -> str:
    repeats = f"{config.repeat_share:.0%} of rows are random tokens that repeat"
    if config.repeat_growth:
        repeats += f" (longer and more varied during {config.repeat_growth:.0%} of the steps)"
    return f"{repeats}, {NEEDLE_SHARE:.0%} keys in text"


def _gate(measured: Measured) -> str:
    ratio = measured.bits_per_byte / measured.compressors["xz"]
    after = measured.bits_per_byte / measured.xz_after_training
    verdict = "below" if ratio < _XZ_GATE else "NOT below"
    return (
        f"That is {ratio:.2f} of xz on the same files, {verdict} the {_XZ_GATE} asked for, and "
        f"{after:.2f} of what xz needs for them once it has seen the training text."
    )


def _most(measured: Measured) -> str:
    (layer, head), growth = max(measured.without.items(), key=lambda item: item[1])
    return f"{growth:+.3f} nats (layer {layer}, head {head})"


def _verdict(measured: Measured) -> str:
    first, second = measured.repeat_losses
    hurt, other = measured.without_best, fmean(measured.without_others)
    induction, previous = measured.induction.score, measured.previous_token.score
    missed = [
        text
        for is_met, text in (
            (induction >= 0.8, f"the induction score is {induction:.3f}, not 0.8"),
            (previous >= 0.5, f"the previous-token score is {previous:.3f}, not 0.5"),
            (first >= 5, f"the loss of the first half is {first:.2f} nats, not 5"),
            (second <= 0.5, f"the loss of the second half is {second:.3f} nats, not 0.5"),
            (
                hurt > 0 and hurt >= 20 * other,
                f"without the best induction head the loss grows by {hurt:.3f} nats, without "
                f"another by {other:.4f} on average: not 20 times. Heads stand in for each other, "
                f"{measured.num_induction_heads} have a score of 0.5 or more; and the mean is "
                f"mostly that of one head, {_most(measured)}",
            ),
        )
        if not is_met
    ]
    return f"Missed: {'; '.join(missed)}." if missed else "All of it is met."
