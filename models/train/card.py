"""The card of a trained model."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from models.checkpoints.history import Step, Training
from models.train.config import TrainConfig
from models.train.corpus import Corpus
from models.train.measure import NUM_PROBES, Measured
from models.train.state import Point
from models.train.tokenizer import SPECIAL_TOKENS
from models.train.trainer import BETAS, MAX_GRADIENT_NORM
from models.train.verdict import gate, most_costly, retrieval, verdict

_CARD = """---
model-index:
- name: {name}
  results:
  - task:
      type: text-generation
    dataset:
      name: held-out documents of {sources}
      type: {dataset}
    metrics:
    - type: bits_per_byte
      value: {bpb:.3f}
---

# {name}

A {parameters:.2f} M parameter Llama-format decoder which {origin}.
It exists so that heads can be looked at, removed and shared without a download; it knows little and
must not be used for anything else.

| | |
|---|---|
| heads | `{heads}`, {layers} layers, hidden {hidden}, FFN {ffn}, {embeddings} |
| weights | bfloat16 in the file, float32 when loaded |
| context | {context} tokens; trained on rows of {seq_len}, at the end of {final_seq_len} |
| tokenizer | byte-level BPE, {vocab} tokens, {special_tokens} |
| training | {tokens:.2f} M tokens in {steps} steps of {batch}, seed {seed}{all_tokens} |
| recipe | AdamW {betas}, weight decay {decay}, rate {rate:g}, cosine to a tenth, clip {clip} |
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

Measured on {probe} sequences of `<bos>` and {period} random tokens that come twice; layers and
heads are counted from 0.

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

{verdict}

{retrieval}

## Make it again

```sh
{commands}
```

| | tokens | rate | minutes | on |
|---|---|---|---|---|
{trainings}

The same seed gives the same losses on the same machine with the same number of threads; a training
goes on where it was interrupted. NOTICE of the texts: see `corpus.json`.
"""


def write_card(
    output: Path,
    config: TrainConfig,
    points: Sequence[Point],
    measured: Measured,
    corpus: Corpus,
    history: Sequence[Step],
    origin: tuple[Path | None, Path | None],
) -> None:
    """Write MODEL_CARD.md into a directory.

    Args:
        history: all steps to the model, the last of which was this training.
        origin: the checkpoint to start from and the teacher, if there were any.
    """
    start, teacher = origin
    shape = measured.shape.config
    first, second = measured.repeat_losses
    names = [source.name for source in corpus.sources]
    has_read = f"has read {', '.join(names)}"
    card = _CARD.format(
        name=output.name,
        sources=", ".join(names),
        dataset="-and-".join(names),
        origin=has_read if start is None else f"was made of `{start.name}` and then {has_read}",
        bpb=measured.bits_per_byte,
        parameters=measured.shape.num_parameters / 1e6,
        heads=shape.head_label,
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.intermediate_size,
        embeddings=f"{'tied' if shape.tie_word_embeddings else 'separate'} embeddings",
        context=shape.max_position_embeddings,
        seq_len=config.seq_len,
        final_seq_len=config.final_seq_len,
        vocab=shape.vocab_size,
        special_tokens=", ".join(f"`{name}` {i}" for i, name in enumerate(SPECIAL_TOKENS)),
        tokens=config.num_steps * config.batch_tokens / 1e6,
        all_tokens=_all_tokens(history),
        steps=config.num_steps,
        batch=config.batch_tokens,
        seed=config.seed,
        betas=BETAS,
        clip=MAX_GRADIENT_NORM,
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
        gate=gate(measured),
        probe=NUM_PROBES,
        period=measured.period,
        induction=measured.induction,
        num_induction=measured.num_induction_heads,
        previous=measured.previous_token,
        sink=measured.sink,
        first=first,
        second=second,
        ablated=measured.without_best,
        others_mean=fmean(measured.without_others.values()),
        others_median=median(measured.without_others.values()),
        most=most_costly(measured.without),
        verdict=verdict(measured),
        retrieval=retrieval(measured.retrieval),
        commands="\n".join(step.command for step in history),
        trainings="\n".join(
            _training(step.name, step.training) for step in history if step.training is not None
        ),
    )
    (output / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def _all_tokens(history: Sequence[Step]) -> str:
    trainings = [step.training for step in history if step.training is not None]
    if len(trainings) == 1:
        return ""
    return f"; {sum(each.num_tokens for each in trainings) / 1e6:.2f} M in all trainings together"


def _training(name: str, training: Training) -> str:
    machine = training.machine
    place = f"{machine['cpu']} ({machine['cpu_capability']}), threads: {machine['threads']}, no GPU"
    if machine["device"] != "cpu":
        place = str(machine["device"])
    versions = f"torch {machine['torch']}, Python {machine['python']}"
    return (
        f"| `{name}` | {training.num_tokens / 1e6:.2f} M | {training.learning_rate:g} | "
        f"{training.seconds / 60:.0f} | {place}, products in {training.products}, {versions} |"
    )


def _mixed_in(config: TrainConfig) -> str:
    repeats = f"{config.repeat_share:.0%} of rows are random tokens that repeat"
    if config.repeat_growth:
        repeats += f" (longer and more varied during {config.repeat_growth:.0%} of the steps)"
    return f"{repeats}, {config.needle_share:.0%} keys in text"
