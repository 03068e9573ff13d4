"""Compiles the kernels in Triton for a GPU, without one, as they are called.

    python -m tests.models.compile_triton

Prints a line for each kernel and kind of heads. Needs a process in which Triton does not interpret.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from models.attention_metadata import AttentionMetadata
from models.before import Before
from models.config import HeadConfig
from models.gpu import fused
from models.kernels import paged_triton
from models.kv_cache import KVCache
from models.positions import Alibi
from models.scoring import Scoring
from tests.models import tiny

HOPPER = GPUTarget("cuda", 90, 32)
# Bytes that a program may have on any GPU of compute capability 8 or 9.
_SHARED = 99 * 1024
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _type_of(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _compile(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: int) -> None:
    """In place of a launch, as a GPU gets it."""
    kwargs |= {"overlaps": True, "launch_pdl": True}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    signature = {name: _type_of(value) for name, value in zip(kernel.arg_names, args, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    # As a launch finds them: tensors begin at round addresses, and round numbers are known to be.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, value in enumerate(args)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=HOPPER, options=options)
    ptx = compiled.asm["ptx"]
    wait = ptx.find("griddepcontrol.wait")
    touched = [ptx.find(word) for word in ("ld.global", "st.global", "cp.async.c")]
    first = min(place for place in touched if place >= 0)
    assert 0 <= wait < first, f"{kernel.__name__} reads what may not have been written yet"
    assert compiled.metadata.shared <= _SHARED, f"{kernel.__name__}: {compiled.metadata.shared}"
    print(kernel.__name__, "mma" if "mma" in ptx else "-", flush=True)


def compile_for(
    heads: HeadConfig, scoring: Scoring, dtype: torch.dtype, num_new_tokens: list[int]
) -> None:
    config = tiny.llama(layers=(heads,))
    cpu = torch.device("cpu")
    cache = KVCache(config, num_pages=1, block_size=16, dtype=dtype, device=cpu)
    metadata = AttentionMetadata.build(
        block_tables=[[[0]]] * len(num_new_tokens),
        num_computed_tokens=[0] * len(num_new_tokens),
        num_new_tokens=num_new_tokens,
        block_size=16,
        device=cpu,
    )
    count = sum(num_new_tokens)
    query = torch.zeros(count, heads.num_heads, heads.head_dim, dtype=dtype)
    key = torch.zeros(count, heads.num_kv_heads, heads.head_dim, dtype=dtype)
    angles = torch.zeros(count, 1, heads.head_dim // 2, dtype=dtype)
    part = cache.layers[0][0]
    paged_triton.rotate_and_store(
        query,
        key,
        key,
        None if scoring.alibi else (angles, angles),
        part.pool,
        metadata.groups[0].slot_mapping,
        part.places,
        interleaved=scoring.softcap is not None,
    )
    paged_triton.paged_attention(query, part, metadata.groups[0], scoring)


def compile_fused() -> None:
    wide = torch.zeros(2, 256)
    fused.multiply(torch.zeros(640, 256), wide)
    half = torch.bfloat16
    weight, norm = torch.zeros(640, 256, dtype=half), torch.zeros(256, dtype=half)
    for rows in (1, 2):
        x, residual = torch.zeros(rows, 256, dtype=half), torch.zeros(rows, 640, dtype=half)
        fused.multiply(weight, x, residual=residual)
    fused.multiply(weight, x[:1], before=Before(norm=norm, eps=1e-5))
    fused.multiply(weight, torch.zeros(1, 512, dtype=half), before=Before(swiglu=True))
    fused.rms_norm(x, norm, 1e-5)
    fused.silu_mul(residual)


if __name__ == "__main__":
    JITFunction.run = _compile
    compile_fused()
    compile_for(HeadConfig(20, 1, 64), Scoring(0.125), torch.bfloat16, [1, 1])
    compile_for(
        HeadConfig(4, 2, 80),
        Scoring(0.125, window=(3, None, 5, 7), softcap=30.0, sinks=torch.zeros(4)),
        torch.float16,
        [1, 9],
    )
    slopes = Scoring(0.125, alibi=Alibi((0.5, 0.25)))
    compile_for(HeadConfig(2, 2, 16), slopes, torch.float32, [1])
    compile_for(HeadConfig(2, 1, 256), Scoring(0.125), torch.bfloat16, [1])
