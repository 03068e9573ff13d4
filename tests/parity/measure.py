"""What is compared with transformers, for one row of the matrix."""

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from models import load_model
from models.transformer import Transformer
from service.engine import Engine, EngineConfig, SamplingParams
from tests import checkpoints
from tests.parity.row import Change, Row

PROMPT_LENGTHS = (1, 5, 16, 33)
NUM_GENERATED = 20
LOGIT_BAR = 1e-5
POWER_BAR = 1e-2
FINE_POWER_BAR = 5e-4


@dataclass(frozen=True)
class Pair:
    """A model of transformers, the directory it was saved to, and ours that was read from there."""

    row: Row
    theirs: PreTrainedModel
    path: Path
    ours: Transformer


def make_pair(row: Row, directory: Path) -> Pair:
    config = row.make()
    kind = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
    theirs = checkpoints.randomise(kind.from_config(config), attention=row.attention)
    checkpoints.save(theirs, directory)
    return Pair(row, theirs, directory, load_model(directory))


def expected(theirs: PreTrainedModel, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Logits of a decoder, hidden states of an encoder.

    By a fresh copy, because some rotary embeddings of transformers remember what they were given.
    """
    with torch.inference_mode():
        outputs = copy.deepcopy(theirs)(input_ids, **inputs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state  # type: ignore[no-any-return]


def actual(ours: Transformer, input_ids: Tensor, *, encoder: bool | None = None) -> Tensor:
    encoder = not ours.config.is_causal if encoder is None else encoder
    if not encoder:
        return ours.logits(input_ids)
    with torch.inference_mode():
        return ours.forward_dense(input_ids).float()


def tokens(num_sequences: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 256, (num_sequences, length), generator=generator)


def logit_error(pair: Pair, length: int) -> float:
    input_ids = tokens(2, length)
    return _distance(actual(pair.ours, input_ids), expected(pair.theirs, input_ids))


def logit_spread(pair: Pair) -> float:
    return float(expected(pair.theirs, tokens(2, 40)).std())


def has_batches(pair: Pair) -> bool:
    """Whether sequences of transformers can share a batch and be computed as if they were alone.

    Not where the longest of them decides how all are rotated.
    """
    return pair.ours.config.is_causal and not pair.ours.config.rope_depends_on_length


def padded_error(pair: Pair) -> float:
    """Theirs in a batch that is padded on the left, ours alone."""
    sequences = [tokens(1, length) for length in (3, 11, 17)]
    ids, mask = _pad_left(sequences)
    inputs = {"attention_mask": mask}
    if "position_ids" in inspect.signature(pair.theirs.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = expected(pair.theirs, ids, **inputs)
    return max(
        _distance(actual(pair.ours, sequence)[0], row[-sequence.shape[1] :])
        for sequence, row in zip(sequences, theirs, strict=True)
    )


def bfloat16_errors(pair: Pair) -> tuple[float, float]:
    """Our largest error in bfloat16, and theirs, both against their float32.

    Over many tokens: with a mixture of experts, the largest error is that of a token whose experts
    change through rounding, and each of the two models has to meet one.
    """
    input_ids = tokens(32, 40)
    exact = expected(pair.theirs, input_ids)
    rounded = expected(copy.deepcopy(pair.theirs).to(torch.bfloat16), input_ids).float()
    ours = actual(load_model(pair.path, dtype=torch.bfloat16), input_ids)
    return _distance(ours, exact), _distance(rounded, exact)


def our_greedy(pair: Pair, prompts: list[list[int]]) -> list[list[int]]:
    """Through the paged engine, whose chunks are shorter than the longest prompt."""
    engine = Engine.from_checkpoint(
        pair.path, EngineConfig(max_num_seqs=8, max_num_batched_tokens=24)
    )
    sampling = SamplingParams(temperature=0, max_tokens=NUM_GENERATED, ignore_eos=True)
    return [output.token_ids for output in engine.generate(prompts, sampling)]


def sampled_error(pair: Pair) -> tuple[float, int]:
    """Largest difference of the log-probability of any sampled token, and the fewest distinct
    tokens of any request.

    Ours from the paged engine while it generates, theirs of the whole text at once: greedy
    tokens alone say little where a model repeats one.
    """
    engine = Engine.from_checkpoint(
        pair.path, EngineConfig(max_num_seqs=8, max_num_batched_tokens=24)
    )
    prompts = greedy_prompts()
    sampling = SamplingParams(
        temperature=3.0, seed=5, max_tokens=NUM_GENERATED, ignore_eos=True, logprobs=0
    )
    error, distinct = 0.0, NUM_GENERATED
    for prompt, output in zip(prompts, engine.generate(prompts, sampling), strict=True):
        text = torch.tensor([prompt + output.token_ids])
        logprobs = expected(pair.theirs, text)[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        theirs = logprobs.gather(1, text[0, len(prompt) :, None]).squeeze(1)
        ours = torch.tensor([token.logprob for token in output.logprobs])
        error = max(error, _distance(ours, theirs))
        distinct = min(distinct, len(set(output.token_ids)))
    return error, distinct


def their_greedy(pair: Pair, prompts: list[list[int]]) -> list[list[int]]:
    if not has_batches(pair):
        return [_generate(pair, [prompt])[0] for prompt in prompts]
    return _generate(pair, prompts)


def greedy_prompts() -> list[list[int]]:
    return [tokens(1, length, seed=1)[0].tolist() for length in PROMPT_LENGTHS]


def power(pair: Pair, change: Change) -> float:
    """How far the logits move when a feature is switched off in our model."""
    input_ids = tokens(2, max(pair.row.lengths))
    other = Transformer(change(pair.ours.config))
    state, wanted = pair.ours.state_dict(), other.state_dict()
    other.load_state_dict({name: state[name] for name in wanted})
    encoder = not pair.ours.config.is_causal
    changed = actual(other.eval(), input_ids, encoder=encoder)
    return _distance(changed, actual(pair.ours, input_ids))


def _generate(pair: Pair, prompts: list[list[int]]) -> list[list[int]]:
    ids, mask = _pad_left([torch.tensor([prompt]) for prompt in prompts])
    generated = copy.deepcopy(pair.theirs).generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NUM_GENERATED,
        min_new_tokens=NUM_GENERATED,
        pad_token_id=0,
        use_cache=pair.row.cached,
    )
    return generated[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def _pad_left(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `[batch, longest]` of sequences `[1, tokens]`."""
    longest = max(sequence.shape[1] for sequence in sequences)
    padding = [longest - sequence.shape[1] for sequence in sequences]
    ids = [
        torch.nn.functional.pad(s, (count, 0)) for s, count in zip(sequences, padding, strict=True)
    ]
    mask = torch.stack([(torch.arange(longest) >= count).long() for count in padding])
    return torch.cat(ids), mask


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())
