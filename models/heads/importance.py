"""Which heads matter: several answers to the same question.

What is ranked is what can be removed with its share of the key/value cache: a key/value head with
the query heads that read it; in multi-head attention, a head.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from models.errors import ConfigError
from models.heads.gates import gate_heads, head_means, open_gates, text_loss
from models.heads.inputs import attention_weights
from models.heads.weights import HeadWeights
from models.transformer import Transformer

Ranking: TypeAlias = Literal["weights", "entropy", "gradient", "ablation", "gates", "random"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
Scores: TypeAlias = list[Tensor]
Progress: TypeAlias = Callable[[int, int], None]

# Hard concrete distribution (Louizos et al. 2018).
_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1
_GATE_STEPS, _GATE_RATE, _GATE_PENALTY = 120, 0.1, 0.02


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
      OV circuit, Elhage et al. 2021). Reads no text.
    - `entropy`: one minus the mean entropy of its weights, as a share of that of equal weights:
      confident heads matter (Voita et al. 2019).
    - `gradient`: mean |dL/dg| of a gate `g` that turns the head down to its mean (Michel et al.
      2019).
    - `ablation`: by how much the loss grows when the head hands on its mean. One pass for each.
    - `gates`: logits of gates that are learned with a price on each open one while the model stays
      as it is (L0 of Louizos et al. 2018, after Voita et al. 2019).
    - `random`: nothing; what every other has to beat.

    Args:
        batches: int64 `[batch, tokens]` each, text.
        seed: decides what is drawn, by `gates` and `random`.
        on_progress: is told steps done and steps in all.
    """
    if ranking == "weights":
        return _weight_norms(model)
    if ranking == "random":
        generator = torch.Generator().manual_seed(seed)
        counts = [heads.num_kv_heads for heads in model.config.layers]
        return [torch.rand(n, generator=generator, dtype=torch.float64) for n in counts]
    if ranking == "gates":
        return _learned_gates(model, batches, seed, on_progress)
    measure = {"entropy": _confidence, "gradient": _gate_gradients, "ablation": _ablations}
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
    return scores


@torch.inference_mode()
def _confidence(model: Transformer, batches: Sequence[Tensor], on_progress: Progress) -> Scores:
    sums = _zeros(model)
    for done, ids in enumerate(batches, 1):
        num_keys = torch.arange(2, ids.shape[1] + 1, device=ids.device)
        for layer, weights in enumerate(attention_weights(model, ids)):
            entropy = torch.special.entr(weights[:, :, 1:]).sum(dim=-1) / num_keys.log()
            of_heads = (1 - entropy).double().mean(dim=(0, 2))
            sums[layer] += of_heads.view(len(sums[layer]), -1).mean(dim=1).cpu()
        on_progress(done, len(batches))
    return [layer / len(batches) for layer in sums]


def _gate_gradients(model: Transformer, batches: Sequence[Tensor], on_progress: Progress) -> Scores:
    means, sums = head_means(model, batches), _zeros(model)
    for done, ids in enumerate(batches, 1):
        gates = [gate.requires_grad_() for gate in open_gates(model)]
        with torch.enable_grad():
            loss = text_loss(model, ids, gate_heads(means, gates))
        for layer, gradient in enumerate(torch.autograd.grad(loss, gates)):
            sums[layer] += gradient.double().abs().cpu()
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
    means = head_means(model, batches)
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.full_like(gate, 2.0).requires_grad_() for gate in open_gates(model)]
    optimizer = torch.optim.Adam(logits, lr=_GATE_RATE)
    for step in range(_GATE_STEPS):
        ids = batches[step % len(batches)]
        with torch.enable_grad():
            gates = [_hard_concrete(layer, generator) for layer in logits]
            is_open = [(each - _TEMPERATURE * math.log(-_LOW / _HIGH)).sigmoid() for each in logits]
            price = _GATE_PENALTY * torch.cat(is_open).sum()
            (text_loss(model, ids, gate_heads(means, gates)) + price).backward()
        optimizer.step()
        optimizer.zero_grad()
        on_progress(step + 1, _GATE_STEPS)
    return [layer.detach().double().cpu() for layer in logits]


def _hard_concrete(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A draw of gates between 0 and 1, both included, that passes gradients to its logits."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
    drawn = ((uniform.logit() + logits) / _TEMPERATURE).sigmoid()
    return (drawn * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def _zeros(model: Transformer) -> Scores:
    counts = [heads.num_kv_heads for heads in model.config.layers]
    return [torch.zeros(count, dtype=torch.float64) for count in counts]
