"""Do the tests notice? Breaks the code in one place at a time and runs the tests that must fail.

    python -m tests.mutations            # all, and writes docs/mutations.md
    python -m tests.mutations window     # only those whose name contains the word

Each mutation is made in a copy of the source tree, never in the tree itself.
"""

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.progress import track

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "mutations.md"
_COPIED = ("models", "service", "protos", "tests", "loadtests", "pyproject.toml", "docs")
_PARITY = "tests/parity/test_transformers.py"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mistake: in `file`, `old` (which occurs once) becomes `new`.

    Attributes:
        tests: arguments for pytest: what must notice.
        survives: why no test can notice, for a mistake that changes nothing.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""


def without_bias(columns: str) -> str:
    """Projected queries, keys and values, some of them without their bias."""
    return f"        projected[:, {columns}] -= self.qkv.bias[{columns}]\n{_HEADS}"


def parity(rows: str) -> tuple[str, ...]:
    """The logits of some rows of the parity matrix."""
    return (_PARITY, "-k", f"logits and ({rows})")


_HEADS = "        each = heads.num_heads, heads.num_kv_heads, heads.num_kv_heads\n"
_PROJECT = "        query, key, value = self._project(hidden, before)\n"
_RETURN = "        return (*self._rotate(query, key, rotation), value)\n"
_ROTATE_AND_NORM = """        query, key = self._rotate(query, key, rotation)
        if query_norm is not None and self.key_norm is not None:
            query, key = query_norm(query), self.key_norm(key)
        return query, key, value
"""
_CAP = """    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
"""
_HIDE = """    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
"""
_BIAS = """    if bias is not None:
        scores = scores + bias
"""

MUTATIONS = (
    Mutation(
        "scale 1/d instead of 1/sqrt(d)",
        "models/config.py",
        "self.head_dim**-0.5 if",
        "1 / self.head_dim if",
        parity("llama"),
    ),
    Mutation(
        "scale applied twice",
        "models/attention.py",
        "scale: float | Tensor = heads.softmax_scale",
        "scale: float | Tensor = heads.softmax_scale**2",
        parity("llama"),
    ),
    Mutation(
        "query bias dropped",
        "models/attention.py",
        _HEADS,
        without_bias(": self.query_width"),
        parity("qwen2"),
    ),
    Mutation(
        "key bias dropped, with rotation",
        "models/attention.py",
        _HEADS,
        without_bias("self.query_width : -self.kv_width"),
        parity("qwen2"),
    ),
    Mutation(
        "key bias dropped, without rotation",
        "models/attention.py",
        _HEADS,
        without_bias("self.query_width : -self.kv_width"),
        (_PARITY, "-k", "logits and gpt2 and not bigcode"),
        survives="the same number is added to all scores of a query; the softmax does not see it",
    ),
    Mutation(
        "value bias dropped",
        "models/attention.py",
        _HEADS,
        without_bias("-self.kv_width :"),
        parity("qwen2"),
    ),
    Mutation(
        "output bias dropped",
        "models/checkpoints/loader.py",
        "state[name] = joined",
        'state[name] = (joined * (not name.endswith("attention.output.bias")))',
        parity("gpt2"),
    ),
    Mutation(
        "key/value heads repeated in the wrong order",
        "models/kernels/reference.py",
        "key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)",
        "key, value = key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1)",
        ("tests/models/test_kernels.py",),
    ),
    Mutation(
        "rotation pairs swapped: halves and neighbours",
        "models/rope.py",
        "    if interleaved:\n",
        "    if not interleaved:\n",
        parity("llama or gptj"),
    ),
    Mutation(
        "rotation before the query/key norm",
        "models/attention.py",
        _PROJECT + _RETURN,
        "        query_norm, self.query_norm = self.query_norm, None\n"
        f"{_PROJECT}        self.query_norm = query_norm\n{_ROTATE_AND_NORM}",
        parity("qwen3"),
    ),
    Mutation(
        "window one token wider",
        "models/scoring.py",
        ".abs() < self._window_tensor",
        ".abs() <= self._window_tensor",
        parity("mistral"),
    ),
    Mutation(
        "window one token narrower",
        "models/scoring.py",
        ".abs() < self._window_tensor",
        ".abs() + 1 < self._window_tensor",
        parity("mistral"),
    ),
    Mutation(
        "windows on the wrong layers",
        "models/checkpoints/families/family.py",
        "return tuple(known[kind] for kind in types)",
        "return tuple(not known[kind] for kind in types)",
        parity("gemma2"),
    ),
    Mutation(
        "windows on the wrong layers, in the older dialect",
        "models/checkpoints/families/gemma.py",
        "slides=lambda index: index % 2 == 0",
        "slides=lambda index: index % 2 == 1",
        ("tests/models/checkpoints/test_families.py",),
    ),
    Mutation(
        "soft-cap after the mask",
        "models/kernels/reference.py",
        _CAP + _BIAS + _HIDE,
        _BIAS + _HIDE + _CAP,
        parity("gemma2"),
    ),
    Mutation(
        "learned sinks dropped",
        "models/attention.py",
        "            sinks=self.sinks,\n",
        "",
        parity("gpt_oss"),
    ),
    Mutation(
        "learned sinks contribute a value",
        "models/kernels/dense.py",
        "pad(value, (0, 0, 0, 1))",
        "pad(value, (0, 0, 0, 1), value=1.0)",
        parity("gpt_oss"),
    ),
    Mutation(
        "attention factor of YaRN once instead of on both sides",
        "models/rope.py",
        "return scaling.attention_factor",
        "return scaling.attention_factor**0.5",
        parity("yarn"),
    ),
    Mutation(
        "YaRN bounds always rounded",
        "models/rope.py",
        "    if scaling.truncate:\n",
        "    if True:\n",
        parity("gpt_oss"),
    ),
    Mutation(
        "YaRN bounds never rounded",
        "models/rope.py",
        "    if scaling.truncate:\n",
        "    if False:\n",
        parity("llama and yarn"),
    ),
    Mutation(
        "Falcon's ALiBi in float32",
        "models/scoring.py",
        "        if self.alibi.bfloat16:\n",
        "        if False:\n",
        (_PARITY, "-k", "falcon"),
    ),
    Mutation(
        "Falcon's ALiBi after the scale",
        "models/scoring.py",
        "        if self.alibi.before_scale:\n",
        "        if False:\n",
        parity("falcon"),
    ),
    Mutation(
        "epsilon of the layer norms",
        "models/layers.py",
        "return LayerNorm(config.hidden_size, eps=config.norm_eps,",
        "return LayerNorm(config.hidden_size, eps=config.norm_eps * 2,",
        parity("neox"),
    ),
    Mutation(
        "epsilon of the RMS norms",
        "models/layers.py",
        "RMSNorm(config.hidden_size, config.norm_eps,",
        "RMSNorm(config.hidden_size, config.norm_eps * 2,",
        parity("llama"),
    ),
    Mutation(
        "Gemma's norms multiply by w instead of 1 + w",
        "models/layers.py",
        "(1 + weight.to(wide))",
        "weight.to(wide)",
        parity("gemma"),
    ),
    Mutation(
        "exact GELU instead of its tanh form",
        "models/layers.py",
        'gelu(x, approximate="tanh")',
        "gelu(x)",
        parity("gpt2 or gemma"),
    ),
    Mutation(
        "tanh form instead of the exact GELU",
        "models/layers.py",
        "            return gelu(x)\n",
        '            return gelu(x, approximate="tanh")\n',
        parity("neox or falcon"),
    ),
    Mutation(
        "positions start one later",
        "models/transformer.py",
        "positions + self.config.position_offset",
        "positions + self.config.position_offset + 1",
        parity("gpt2 or opt"),
    ),
    Mutation(
        "second norm of a sandwich missing",
        "models/decoder_layer.py",
        "return hidden + output_norm(block(hidden, norm))",
        "return hidden + block(hidden, norm)",
        parity("gemma2"),
    ),
    Mutation(
        "embeddings not scaled",
        "models/transformer.py",
        "if self.config.embedding_scale != 1.0:",
        "if False:",
        parity("gemma"),
    ),
    Mutation(
        "output head tied although it is not",
        "models/transformer.py",
        "if self.lm_head is not None:\n            return",
        "if False:\n            return",
        parity("llama"),
    ),
    Mutation(
        "tokens of different requests share a rotation length",
        "service/engine/model_runner.py",
        "[item.seq.min_rope_length for item",
        "[max(other.seq.min_rope_length for other in scheduled) for item",
        (_PARITY, "-k", "dynamic and greedy"),
    ),
    Mutation(
        "a LongRoPE sequence is not computed again at the switch",
        "service/engine/scheduler.py",
        "            self._preempt(seq)\n            seq.min_rope_length",
        "            seq.min_rope_length",
        (_PARITY, "tests/engine/test_scheduler.py", "-k", "phi3 or switch"),
    ),
    Mutation(
        "a decode reads the key/value head of another group",
        "models/kernels/dense.py",
        "query = query.unflatten(1, (num_kv_heads, -1)).squeeze(3)",
        "query = query.unflatten(1, (-1, num_kv_heads)).transpose(1, 2).squeeze(3)",
        ("tests/models/test_kernels.py",),
    ),
    Mutation(
        "a decode in half precision reads the key/value head of another group",
        "models/kernels/dense.py",
        "grouped = query.squeeze(2).unflatten(1, (key.shape[1], -1))",
        "grouped = query.squeeze(2).unflatten(1, (-1, key.shape[1])).transpose(1, 2)",
        ("tests/models/test_kernels.py", "-k", "bfloat16"),
    ),
    Mutation(
        "a window one token wider, in C++",
        "models/scoring.py",
        "MAX_WINDOW if size is None else size for",
        "MAX_WINDOW if size is None else size + 1 for",
        ("tests/models/test_kernels.py", "-k", "paged_cpu"),
    ),
    Mutation(
        "learned sinks dropped, in C++",
        "models/kernels/paged_cpu.py",
        "[] if scoring.sinks is None else scoring.sinks.tolist()",
        "[]",
        ("tests/models/test_kernels.py", "-k", "paged_cpu"),
    ),
    Mutation(
        "layers as one call are not described anew",
        "models/cpu/decoder_stack.py",
        "all(map(is_, chain.from_iterable(values), self._pieces))",
        "True",
        ("tests/models/cpu/test_decoder_stack.py", "-k", "change"),
    ),
    Mutation(
        "layers as one call although a hook watches",
        "models/cpu/decoder_stack.py",
        "and not any(self._hooks)\n            and not any(_GLOBAL_HOOKS)",
        "and True",
        ("tests/models/cpu/test_decoder_stack.py", "-k", "change"),
    ),
    Mutation(
        "layers as one call without their clamp",
        "models/cpu/decoder_stack.py",
        "and attention.heads.clip_qkv is None",
        "and True",
        ("tests/models/cpu/test_decoder_stack.py", "-k", "modules"),
    ),
    Mutation(
        "neighbours in large pages overlap",
        "models/memory.py",
        "self._at += -(-num_bytes // _LINE) * _LINE",
        "self._at += num_bytes // _LINE * _LINE",
        ("tests/models/test_memory.py",),
    ),
    Mutation(
        "sinks do not take part, in Triton",
        "models/gpu/attention.py",
        "total = tl.full([rows], 1.0, tl.float32)",
        "total = tl.full([rows], 0.0, tl.float32)",
        ("tests/models/test_paged_triton.py",),
    ),
    Mutation(
        "spans are joined without their maxima, in Triton",
        "models/gpu/attention.py",
        "add = tl.exp2((their_highest - higher[None, :]) * _LOG2_E)",
        "add = their_highest * 0.0 + 1.0",
        ("tests/models/test_paged_triton.py",),
    ),
    Mutation(
        "a row of nobody writes to the cache, in Triton",
        "models/gpu/rotation.py",
        "    if slot < 0:\n",
        "    if slot < -1:\n",
        ("tests/models/test_decode_graphs.py",),
    ),
    Mutation(
        "a name with two types, in Triton",
        "models/gpu/rotation.py",
        "        values = tl.load(",
        "        row = values = tl.load(",
        ("tests/models/test_triton_compiles.py",),
    ),
    Mutation(
        "a recorded step reads what has been freed",
        "models/gpu/decode_graphs.py",
        "_Recorded(replay, views)",
        "_Recorded(replay, _Views(views.ids, views.computed, AttentionMetadata(())))",
        ("tests/models/test_decode_graphs.py",),
    ),
    Mutation(
        "a norm before a product forgets its epsilon, in Triton",
        "models/gpu/linear.py",
        "product *= tl.rsqrt(tl.sum(squares, axis=0) / inputs + eps)",
        "product *= tl.rsqrt(tl.sum(squares, axis=0) / inputs)",
        ("tests/models/test_triton_fused.py",),
    ),
    Mutation(
        "every row gets the residual of the first, in Triton",
        "models/gpu/linear.py",
        "tl.load(residual + to, mask=there, other=0.0)",
        "tl.load(residual + out[None, :] + row[:, None] * 0, mask=there, other=0.0)",
        ("tests/models/test_triton_fused.py",),
    ),
    Mutation(
        "a foreseen decode goes on with the token of another sequence",
        "service/engine/model_runner.py",
        "tokens = [rows[id(item.seq)] for",
        "tokens = [len(rows) - 1 - rows[id(item.seq)] for",
        ("tests/engine/test_graphs.py",),
    ),
    Mutation(
        "a run of decodes goes on although another may be admitted",
        "service/engine/scheduler.py",
        "self._decode_run is not None and self._admits_nobody",
        "self._decode_run is not None",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes goes on with who has ended",
        "service/engine/scheduler.py",
        "            self._decode_run = None\n            self.block_manager.free(seq)\n",
        "            self.block_manager.free(seq)\n",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes passes the longest length by a token",
        "service/engine/decode_run.py",
        "self._num_quiet < 0",
        "self._num_quiet < -1",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes passes the tokens that end it",
        "service/engine/decode_run.py",
        "not self._last_token_ids.isdisjoint(results)",
        "False",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes passes stop strings",
        "service/engine/decode_run.py",
        "if any(seq.match_stop for seq in seqs):",
        "if False:",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes passes the switch of a rotation",
        "service/engine/decode_run.py",
        "if self._rope_switch_length is not None:",
        "if False:",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes gives windows' blocks back late",
        "service/engine/block_manager.py",
        "self._turns = {0, *(",
        "self._turns = {0} or {*(",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a run of decodes fills blocks that are never found again",
        "service/engine/block_manager.py",
        "start % self.block_size == last]",
        "start % self.block_size == last - 1]",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a kept batch reads the blocks of the step before",
        "models/attention_metadata.py",
        '                self._tables[first : first + len(table)] = array("i", table)\n',
        "                pass\n",
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "a kept batch gathers what the step before did",
        "models/attention_metadata.py",
        '_FORMS_OF_ONE_STEP = ("batches", "max_length")',
        '_FORMS_OF_ONE_STEP = ("max_length",)',
        ("tests/engine/test_decode_runs.py",),
    ),
    Mutation(
        "who was greedy in one step is greedy in every other",
        "service/engine/sampling_rows.py",
        "if plan.changed is not None and self._are_greedy:",
        "if self._are_greedy:",
        ("tests/engine/test_model_runner.py",),
    ),
    Mutation(
        "logits are trusted although a cap hides what is not finite",
        "service/engine/model_runner.py",
        "self._logits_tell = model.config.logit_softcap is None",
        "self._logits_tell = True",
        ("tests/engine/test_model_runner.py",),
    ),
    Mutation(
        "two decodes of a batch gather into the same rows",
        "models/query_batch.py",
        "            first, wider = at, len(row.live(block_size))\n",
        "            first, wider = at - 1, len(row.live(block_size))\n",
        ("tests/models/test_kv_cache.py", "tests/models/test_kernels.py"),
    ),
    Mutation(
        "keys are not rotated on their way to the cache",
        "models/attention.py",
        "            None if rope is None else rotation,\n",
        "            None,\n",
        ("tests/models/test_paths.py",),
    ),
    Mutation(
        "scales of 8 bits stay when slots are cleared",
        "models/kv_cache.py",
        "for rows in (self._token_rows, self._token_scales):",
        "for rows in (self._token_rows,):",
        ("tests/models/test_int8_kv_cache.py",),
    ),
    Mutation(
        "values of 8 bits take the scales of keys",
        "models/kv_cache.py",
        "both = (both * scale[..., None]).to(self.dtype)",
        "both = (both * scale[:1, ..., None]).to(self.dtype)",
        ("tests/models/test_int8_kv_cache.py",),
    ),
    Mutation(
        "a sequence that lost its blocks stays in the plan",
        "service/engine/scheduler.py",
        "for item in scheduled if item.seq.status is SequenceStatus.RUNNING]",
        "for item in scheduled]",
        ("tests/engine/test_random_engines.py",),
    ),
    Mutation(
        "an admitted sequence has room for its first step only",
        "service/engine/block_manager.py",
        "spoken_for.append(num_reserved + max(most - held, 0))",
        "spoken_for.append(num_reserved)",
        ("tests/engine/test_random_engines.py",),
    ),
    Mutation(
        "cached blocks are found by their own tokens, whatever came before",
        "service/engine/sequence.py",
        "hashlib.sha256(parent + tokens.tobytes())",
        "hashlib.sha256(tokens.tobytes())",
        ("tests/engine/test_block_manager.py", "tests/engine/test_engine.py"),
    ),
    Mutation(
        "a block is given back one token too early",
        "service/engine/block_manager.py",
        "max(seq.num_computed_tokens - window + 1, 0)",
        "max(seq.num_computed_tokens - window + 2, 0)",
        ("tests/engine/test_block_groups.py",),
    ),
    Mutation(
        "newcomers wait as long as steps are foreseen",
        "service/engine/scheduler.py",
        "            or (self.waiting and self._has_changed)\n",
        "",
        ("tests/engine/test_foreseeing.py",),
    ),
    Mutation(
        "later deadlines are forgotten once one has passed",
        "service/engine/scheduler.py",
        "min(later, default=math.inf)",
        "math.inf",
        ("tests/engine/test_scheduler.py",),
    ),
    Mutation(
        "deadlines wait as long as steps are foreseen",
        "service/engine/scheduler.py",
        "            or self._is_overdue()\n",
        "",
        ("tests/engine/test_foreseeing.py",),
    ),
    Mutation(
        "a foreseen step computes who surely ends",
        "service/engine/scheduler.py",
        "            if length_ending(seq, end + 1, self._max_len) is not None:\n",
        "            if False:\n",
        ("tests/engine/test_foreseeing.py",),
    ),
    Mutation(
        "blocks never leave the window",
        "service/engine/block_manager.py",
        "            table = seq.block_tables[index]\n            first_needed",
        "            continue\n            first_needed",
        ("tests/engine/test_block_groups.py",),
    ),
    Mutation(
        "sink tokens leave with the window",
        "service/engine/block_manager.py",
        "reversed(range(self._blocks_for(sink_tokens), first_needed))",
        "reversed(range(first_needed))",
        ("tests/engine/test_block_groups.py",),
    ),
    Mutation(
        "tokens: a scope that is not asked for",
        "service/auth/gate.py",
        "if scopes is None or (scopes and not scopes.intersection(entry.scopes)):",
        "if scopes is None:",
        ("tests/service/auth/test_gate.py", "tests/service/test_logs.py"),
    ),
    Mutation(
        "tokens: an expired one is a good one",
        "service/auth/gate.py",
        "        if entry.has_expired:\n",
        "        if False:\n",
        ("tests/service/auth/test_gate.py", "tests/service/test_logs.py"),
    ),
    Mutation(
        "tokens: the log does not say who was admitted",
        "service/rpc.py",
        '            self.facts["token"] = self.caller\n',
        "",
        ("tests/service/test_logs.py",),
    ),
    Mutation(
        "tokens: the log does not say who was refused",
        "service/rpc.py",
        '            self.facts["token"] = error.token\n',
        "            pass\n",
        ("tests/service/test_logs.py",),
    ),
    Mutation(
        "tokens: the log does not say why one was refused",
        "service/rpc.py",
        '        self.facts["reason"] = reason_of(error)\n',
        "",
        ("tests/service/test_logs.py",),
    ),
    Mutation(
        "tokens: a mistake of the file is told with its text",
        "service/auth/tokens.py",
        '_QUOTED.sub(lambda quoted: quoted[1] or "...", error.problem or "")',
        "str(error)",
        ("tests/service/auth/test_tokens.py",),
    ),
    Mutation(
        "heads: induction read one token too early",
        "models/heads/metrics.py",
        "offset=1 - period",
        "offset=-period",
        ("tests/models/heads/test_metrics.py",),
    ),
    Mutation(
        "ranking: gradients of rows cancel",
        "models/heads/importance.py",
        "gradient.double().abs().sum(dim=0)",
        "gradient.double().sum(dim=0).abs()",
        ("tests/models/heads/test_importance.py",),
    ),
    Mutation(
        "ranking: what lies outside of a window counts as seen",
        "models/heads/importance.py",
        "num_visible = scoring.visible(positions, positions).sum(dim=-1)",
        "num_visible = positions + 1",
        ("tests/models/heads/test_importance.py",),
    ),
    Mutation(
        "ranking: gates learn to lose more",
        "models/heads/importance.py",
        "logits.detach() - _GATE_RATE",
        "logits.detach() + _GATE_RATE",
        ("tests/models/heads/test_importance.py",),
    ),
    Mutation(
        "pruning: the bias has the mean of all heads",
        "models/heads/prune.py",
        "    is_removed[_query_heads(attention.heads, kept)] = False\n",
        "",
        ("tests/models/heads/test_prune.py",),
    ),
    Mutation(
        "pruning: sinks of other heads stay",
        "models/heads/prune.py",
        "attention.sinks[queries]",
        "attention.sinks[: len(queries)]",
        ("tests/models/heads/test_prune.py",),
    ),
    Mutation(
        "heads: keys aligned, their queries not",
        "models/heads/alignment.py",
        "turn @ key[head], turn @ query[head]",
        "turn @ key[head], query[head]",
        ("tests/models/heads/test_convert.py",),
    ),
    Mutation(
        "heads: rotated pairs turned the wrong way",
        "models/heads/alignment.py",
        "-angle.sin(), angle.sin()",
        "angle.sin(), -angle.sin()",
        ("tests/models/heads/test_convert.py",),
    ),
    Mutation(
        "heads: values aligned, their outputs not",
        "models/heads/alignment.py",
        "output[head] @ turn.T",
        "output[head]",
        ("tests/models/heads/test_convert.py",),
    ),
    Mutation(
        "heads: query heads stay where they were",
        "models/heads/convert.py",
        "torch.stack([weights.query[group].flatten(0, 1) for group in groups])",
        "weights.query.view(len(groups), -1, *weights.query.shape[2:])",
        ("tests/models/heads/test_convert.py",),
    ),
    Mutation(
        "heads: grouped by likeness before alignment",
        "models/heads/convert.py",
        'aligned=method == "align"',
        "aligned=False",
        ("tests/models/heads/test_convert.py",),
    ),
    Mutation(
        "heads: refitted to inputs of the converted model",
        "models/heads/refit.py",
        "inputs = head_inputs(original, ids)",
        "inputs = head_inputs(changed, ids)",
        ("tests/models/heads/test_refit.py",),
    ),
    Mutation(
        "low rank: all inputs count alike",
        "models/heads/low_rank.py",
        "weight @ (gram + ridge) @ weight.T",
        "weight @ weight.T",
        ("tests/models/heads/test_low_rank.py",),
    ),
    Mutation(
        "low rank: inputs that were not seen are dropped first",
        "models/heads/low_rank.py",
        "(gram + ridge)",
        "gram",
        ("tests/models/heads/test_low_rank.py",),
    ),
    Mutation(
        "8 bits: scales are stored in bfloat16",
        "models/checkpoints/writer.py",
        "= scale[:, None]",
        "= scale[:, None].bfloat16()",
        ("tests/models/checkpoints/test_int8.py",),
    ),
    Mutation(
        "8 bits: infinite scales are read",
        "models/checkpoints/int8.py",
        'if not 0 <= value < float("inf"):',
        "if value != value or value < 0:",
        ("tests/models/checkpoints/test_int8.py",),
    ),
    Mutation(
        "training: a teacher is heard where nothing can be known",
        "models/train/distillation.py",
        "known = targets != IGNORED",
        "known = targets == targets",
        ("tests/models/train/test_distillation.py",),
    ),
    Mutation(
        "training: the divergence the other way round",
        "models/train/distillation.py",
        "kl_div(*logs,",
        "kl_div(*logs[::-1],",
        ("tests/models/train/test_distillation.py",),
    ),
    Mutation(
        "training: the optimizer begins anew after an interruption",
        "models/train/trainer.py",
        '        optimizer.load_state_dict({**optimizer.state_dict(), "state": state.optimizer})\n',
        "",
        (
            "tests/models/train/test_trainer.py",
            "-k",
            "interrupted",
        ),
    ),
    Mutation(
        "training: norms are left as they are",
        "models/train/trainer.py",
        '[p for p in parameters if p.ndim == 1], "weight_decay"',
        '[], "weight_decay"',
        (
            "tests/models/train/test_trainer.py",
            "-k",
            "parameter",
        ),
    ),
    Mutation(
        "training: gradients are not clipped",
        "models/train/trainer.py",
        "    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)\n",
        "",
        (
            "tests/models/train/test_trainer.py",
            "-k",
            "clipped",
        ),
    ),
    Mutation(
        "training: a start is known by its path alone",
        "models/train/prepared.py",
        '"start": _digest(start)',
        '"start": str(start)',
        (
            "tests/models/train/test_demo.py",
            "-k",
            "start",
        ),
    ),
    Mutation(
        "retrieval: read one token behind the answer",
        "models/train/retrieval.py",
        "answer.start - 1, answer.found)",
        "answer.start - 1, answer.found + 1)",
        ("tests/models/train/test_retrieval.py",),
    ),
    Mutation(
        "training: the first of repeated tokens count in the loss",
        "models/train/rows.py",
        "> period",
        "> 0",
        ("tests/models/train/test_rows.py",),
    ),
    Mutation(
        "training: rows depend on what was drawn before",
        "models/train/rows.py",
        "generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)",
        "generator = torch.default_generator",
        ("tests/models/train/test_rows.py",),
    ),
    Mutation(
        "training: held-out documents are trained on",
        "models/train/corpus.py",
        "if document.part == part and",
        'if (document.part == part or part == "train") and',
        ("tests/models/train/test_corpus.py",),
    ),
    Mutation(
        "training: a state is written over the old one",
        "models/train/files.py",
        'partial = path.with_suffix(".partial")',
        "partial = path",
        ("tests/models/train/test_state.py",),
    ),
    Mutation(
        "training: a layer that is run again leaves out other heads",
        "models/train/head_options.py",
        "generator = torch.Generator().manual_seed(seed * 1009 + layer)",
        "generator = torch.default_generator",
        (
            "tests/models/train/test_trainer.py",
            "-k",
            "again",
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What pytest said: the first test that failed, or none."""

    mutation: Mutation
    failed_test: str | None

    @property
    def as_expected(self) -> bool:
        return (self.failed_test is None) == bool(self.mutation.survives)


def run(mutation: Mutation) -> Outcome:
    """Apply a mutation to a copy of the tree and run its tests.

    Raises:
        RuntimeError: the tests neither passed nor failed: they did not run.
    """
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in _COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        path = tree / mutation.file
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.old) != 1:
            raise RuntimeError(f"{mutation.name}: the text to change is not there exactly once")
        path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = os.environ | {"PYTHONPATH": directory, "PYTHONDONTWRITEBYTECODE": "1"}
        finished = subprocess.run(
            [*command, *mutation.tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    failed = re.search(r"^FAILED (.+?)(?: - |$)", finished.stdout, re.MULTILINE)
    if finished.returncode not in (0, 1) or (finished.returncode == 1) != bool(failed):
        raise RuntimeError(f"{mutation.name}: {finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    return Outcome(mutation, failed[1] if failed else None)


def table(outcomes: list[Outcome]) -> str:
    lines = [
        "# What the tests notice",
        "",
        "Each row breaks the code in one place, in a copy of the tree, and runs the tests that",
        "must fail. Made with `make mutations`.",
        "",
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
        "| mistake | in | noticed by |",
        "|---|---|---|",
    ]
    for outcome in outcomes:
        mutation = outcome.mutation
        noticed = (
            f"nothing can: {mutation.survives}"
            if outcome.failed_test is None
            else f"`{outcome.failed_test.replace('|', ' ')}`"
        )
        lines.append(f"| {mutation.name} | `{mutation.file}` | {noticed} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    console = Console()
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if word in mutation.name]
    outcomes: list[Outcome] = []
    for mutation in track(chosen, "mutations", console=console):
        outcomes.append(run(mutation))
        mark = "ok" if outcomes[-1].as_expected else "[red]UNEXPECTED[/red]"
        console.print(f"{mark}: {mutation.name}: {escape(outcomes[-1].failed_test or 'nothing')}")
    if not word and all(outcome.as_expected for outcome in outcomes):
        TABLE.write_text(table(outcomes), encoding="utf-8")
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
