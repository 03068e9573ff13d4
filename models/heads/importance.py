"""Which heads matter: several answers to the same question.

What is ranked is what can be removed with its share of the key/value cache: a key/value head with
the query heads that read it; in multi-head attention, a head.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from models.errors import ConfigError
from models.heads.gates import gate_heads, head_means, open_gates, text_loss
from models.heads.inputs import attention_weights
from models.heads.weights import HeadWeights
from models.heads.writing import written_sizes
from models.transformer import Transformer

Ranking: TypeAlias = Literal["weights", "entropy", "gradient", "ablation", "gates", "random"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
Scores: TypeAlias = list[Tensor]
Progress: TypeAlias = Callable[[int, int], None]

# Hard concrete distribution (Louizos et al. 2018).
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
# A gate is not shut with a probability of 0.97 at the first mean of the logits, 0.40 at the last.
_GATE_STEPS, _GATE_RATE, _FIRST_MEAN, _LAST_MEAN = 120, 0.1, 2.0, -2.0


def rank_heads(
    model: Transformer,
    batches: Sequence[Tensor],
    ranking: Ranking,
    *,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> Scores:
    """How much each head matters, float64 `[kv_heads]` of each layer; more is more.

    - `weights`: Frobenius norm of what a head can write, its output times its value projection (the
      OV circuit, Elhage et al. 2021), relative to its layer. Reads no text.
    - `entropy`: one minus the mean entropy of its weights, as a share of that of equal weights on
      what it may look at, times the size of what it adds relative to what its layer is given.
      Confident heads matter (Voita et al. 2019), but weights alone do not tell how much they move
      (Kobayashi et al. 2020), nor compare layers.
    - `gradient`: mean over rows of |dL/dg| of a gate `g` that turns the head down to its mean
      (Michel et al. 2019).
    - `ablation`: by how much the loss grows when the head hands on its mean. One pass for each.
    - `gates`: logits of gates that learn to lose little of the text while fewer and fewer of them
      are open and the model stays as it is (hard concrete gates of Louizos et al. 2018, as Voita et
      al. 2019; the mean of the logits takes the place of a price on open gates, which every model
      would need another of).
    - `random`: nothing; what every other has to beat.

    Args:
        batches: int64 `[batch, tokens]` each, text.
        seed: decides what is drawn, by `gates` and `random`.
        on_progress: is told steps done and steps in all.

    Raises:
        ConfigError: there is no text, for a ranking that reads it.
    """
    if ranking == "weights":
        return _weight_norms(model)
    if ranking == "random":
        generator = torch.Generator().manual_seed(seed)
        counts = [heads.num_kv_heads for heads in model.config.layers]
        return [torch.rand(n, generator=generator, dtype=torch.float64) for n in counts]
    if not batches:
        raise ConfigError("batches", list(batches), f"one or more for the ranking {ranking}")
    if ranking == "gates":
        return _learned_gates(model, batches, seed, on_progress)
    measure = {"entropy": _confident_writing, "gradient": _gate_gradients, "ablation": _ablations}
    return measure[ranking](model, batches, on_progress)


def least_important(scores: Scores, count: int) -> list[tuple[int, int]]:
    """The heads with the lowest scores, as (layer, key/value head); each layer keeps its best.

    Raises:
        ConfigError: there are not so many.
    """
    most = sum(len(layer) - 1 for layer in scores)
    if not 0 <= count <= most:
        raise ConfigError("heads to remove", count, f"0 to {most}: each layer keeps one")
    places = [
        (float(score), layer, head)
        for layer, of_layer in enumerate(scores)
        for head, score in enumerate(of_layer)
        if head != int(of_layer.argmax())
    ]
    return sorted((layer, head) for _, layer, head in sorted(places)[:count])


def least_important_by_layer(scores: Scores, keep: Sequence[int]) -> list[tuple[int, int]]:
    """All but the best `keep[layer]` of each layer.

    Raises:
        ConfigError: there is not one number for each layer, or it is not one that a layer has.
    """
    if len(keep) != len(scores):
        raise ConfigError(
            "heads to keep", list(keep), f"one number for each of {len(scores)} layers"
        )
    removed: list[tuple[int, int]] = []
    for layer, (of_layer, count) in enumerate(zip(scores, keep, strict=True)):
        if not 1 <= count <= len(of_layer):
            raise ConfigError(f"heads to keep of layer {layer}", count, f"1 to {len(of_layer)}")
        order = of_layer.argsort(stable=True).tolist()
        removed += [(layer, head) for head in order[: len(order) - count]]
    return sorted(removed)


def _weight_norms(model: Transformer) -> Scores:
    scores: Scores = []
    for attention in model.attentions:
        weights = HeadWeights.of(attention)
        written = weights.output @ weights.value[:, None]
        scores.append(written.square().sum(dim=(1, 2, 3)).sqrt())
    return _relative_to_layer(scores)


@torch.inference_mode()
def _confident_writing(
    model: Transformer, batches: Sequence[Tensor], on_progress: Progress
) -> Scores:
    means, confidence, sizes = head_means(model, batches), _zeros(model), _zeros(model)
    for done, ids in enumerate(batches, 1):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        for layer, weights in enumerate(attention_weights(model, ids)):
            scoring = model.attentions[layer].scoring
            num_visible = scoring.visible(positions, positions).sum(dim=-1)
            # A query that sees one key has no choice: its entropy is 0 and it does not count.
            num_choices = (num_visible > 1).sum(dim=-1).clamp(min=1)
            entropy = torch.special.entr(weights).sum(dim=-1) / num_visible.clamp(min=2).log()
            of_heads = 1 - (entropy.sum(dim=-1) / num_choices).double().mean(dim=0)
            confidence[layer] += _of_groups(of_heads, confidence[layer])
        for layer, size in enumerate(written_sizes(model, ids, means)):
            sizes[layer] += _of_groups(size, sizes[layer])
        on_progress(done, len(batches))
    return [one * other / len(batches) ** 2 for one, other in zip(confidence, sizes, strict=True)]


def _of_groups(of_heads: Tensor, of_layer: Tensor) -> Tensor:
    """The mean over the query heads that read each key/value head."""
    return of_heads.view(len(of_layer), -1).mean(dim=1).to(of_layer)


def _gate_gradients(model: Transformer, batches: Sequence[Tensor], on_progress: Progress) -> Scores:
    means, sums = head_means(model, batches), _zeros(model)
    for done, ids in enumerate(batches, 1):
        # One of its own for each row, lest gradients of opposite signs cancel.
        gates = [gate.repeat(len(ids), 1).requires_grad_() for gate in open_gates(model)]
        with torch.enable_grad():
            loss = text_loss(model, ids, gate_heads(means, gates))
        for layer, gradient in enumerate(torch.autograd.grad(loss, gates)):
            sums[layer] += gradient.double().abs().sum(dim=0).cpu()
        on_progress(done, len(batches))
    return [layer / len(batches) for layer in sums]


@torch.inference_mode()
def _ablations(model: Transformer, batches: Sequence[Tensor], on_progress: Progress) -> Scores:
    means, scores = head_means(model, batches), _zeros(model)
    whole = sum(float(text_loss(model, ids)) for ids in batches)
    total = sum(map(len, scores))
    done = 0
    for layer, of_layer in enumerate(scores):
        for head in range(len(of_layer)):
            gates = open_gates(model)
            gates[layer][head] = 0.0
            edit = gate_heads(means, gates)
            without = sum(float(text_loss(model, ids, edit)) for ids in batches)
            of_layer[head] = (without - whole) / len(batches)
            done += 1
            on_progress(done, total)
    return scores


def _learned_gates(
    model: Transformer, batches: Sequence[Tensor], seed: int, on_progress: Progress
) -> Scores:
    means, counts = head_means(model, batches), [len(layer) for layer in _zeros(model)]
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(sum(counts), device=model.device)
    for step in range(_GATE_STEPS):
        ids = batches[step % len(batches)]
        mean = _FIRST_MEAN + (_LAST_MEAN - _FIRST_MEAN) * step / (_GATE_STEPS - 1)
        with torch.enable_grad():
            gates = _hard_concrete(logits.requires_grad_() + mean, generator).split(counts)
            loss = text_loss(model, ids, gate_heads(means, gates))
        (gradient,) = torch.autograd.grad(loss, logits)
        # Relative to each other: how much all of them weigh differs from model to model.
        size = gradient.square().mean().sqrt().clamp(min=torch.finfo(gradient.dtype).tiny)
        logits = logits.detach() - _GATE_RATE * gradient / size
        logits -= logits.mean()
        on_progress(step + 1, _GATE_STEPS)
    return list(logits.double().cpu().split(counts))


def _hard_concrete(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A draw of gates between 0 and 1, both included, that passes gradients to its logits."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
    drawn = ((uniform.logit() + logits) / _TEMPERATURE).sigmoid()
    return (drawn * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _relative_to_layer(scores: Scores) -> Scores:
    """As a layer's gradients in Michel et al. 2019. What is no loss does not compare layers: the
    stream that heads add to grows, and they with it."""
    return [layer / layer.norm().clamp(min=torch.finfo(layer.dtype).tiny) for layer in scores]


def _zeros(model: Transformer) -> Scores:
    counts = [heads.num_kv_heads for heads in model.config.layers]
    return [torch.zeros(count, dtype=torch.float64) for count in counts]
