"""Rotation of queries and keys, and the write of keys and values to the paged cache, in Triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from models.gpu.launch import await_previous


@triton.jit
def rotate_and_store(
    query,
    key,
    value,
    cos,
    sin,
    pool,
    slots,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    offset,
    page_elements,
    block_elements,
    blocks_per_page,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    block_size: tl.constexpr,
    wide_half: tl.constexpr,
    wide_dim: tl.constexpr,
    interleaved: tl.constexpr,
    overlaps: tl.constexpr,
):
    """One program for each token and head: a query is rotated where it is, a key on its way to its
    slot, a value goes there as it is.

    Args:
        query: `[tokens, num_heads, head_dim]`; key, value: `[tokens, num_kv_heads, head_dim]`; the
            last axis is contiguous.
        cos, sin: `[tokens, half]`; not read where `half` is 0.
        slots: `[tokens]`; of a token whose slot is -1, nothing is rotated or written.
    """
    await_previous(overlaps)
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    block, within = slot // block_size, slot % block_size
    to = (
        pool
        + offset
        + block // blocks_per_page * page_elements
        + block % blocks_per_page * block_elements
        + within * head_dim
    )
    dim = tl.arange(0, wide_dim)
    if head >= num_heads + num_kv_heads:
        kv_head = head - num_heads - num_kv_heads
        values = tl.load(
            value + token.to(tl.int64) * value_token_stride + kv_head * value_head_stride + dim,
            mask=dim < head_dim,
        )
        to += (num_kv_heads + kv_head) * block_size * head_dim
        tl.store(to + dim, values, mask=dim < head_dim)
    else:
        if head < num_heads:
            row = query + token.to(tl.int64) * query_token_stride + head * query_head_stride
            turned = row
        else:
            kv_head = head - num_heads
            row = key + token.to(tl.int64) * key_token_stride + kv_head * key_head_stride
            turned = to + kv_head * block_size * head_dim
            still = (dim >= 2 * half) & (dim < head_dim)
            tl.store(turned + dim, tl.load(row + dim, mask=still), mask=still)
        if half > 0:
            pair = tl.arange(0, wide_half)
            there = pair < half
            if interleaved:
                first, second = 2 * pair, 2 * pair + 1
            else:
                first, second = pair, pair + half
            x = tl.load(row + first, mask=there, other=0.0).to(tl.float32)
            y = tl.load(row + second, mask=there, other=0.0).to(tl.float32)
            c = tl.load(cos + token * half + pair, mask=there, other=0.0).to(tl.float32)
            s = tl.load(sin + token * half + pair, mask=there, other=0.0).to(tl.float32)
            dtype = pool.dtype.element_ty
            tl.store(turned + first, (x * c - y * s).to(dtype), mask=there)
            tl.store(turned + second, (y * c + x * s).to(dtype), mask=there)
