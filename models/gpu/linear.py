"""Products with few rows in Triton: they take as long as the weight takes to be read.

What comes before and after a product is done by the same kernel where that is free: of one row,
every program can do it again.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from models.gpu.launch import await_previous


@triton.jit
def multiply_row(
    x,
    weight,
    bias,
    norm,
    residual,
    output,
    outputs,
    inputs,
    eps,
    has_bias: tl.constexpr,
    has_norm: tl.constexpr,
    has_swiglu: tl.constexpr,
    has_residual: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    overlaps: tl.constexpr,
):
    """One row; one program for some outputs.

    Args:
        x: `[inputs]`; gate and value behind one another with `has_swiglu`.
        weight: `[outputs, inputs]`.
        norm: `[inputs]`, the weight of an RMS norm of `x`.
        residual: `[outputs]`, added to the product.
    """
    await_previous(overlaps)
    out = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    is_out = out < outputs
    row = weight + out.to(tl.int64) * inputs
    total = tl.zeros([tile_outputs, tile_inputs], tl.float32)
    squares = tl.zeros([tile_inputs], tl.float32)
    for first in range(0, inputs, tile_inputs):
        column = first + tl.arange(0, tile_inputs)
        there = column < inputs
        w = tl.load(
            row[:, None] + column[None, :], mask=is_out[:, None] & there[None, :], other=0.0
        )
        a = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
        if has_swiglu:
            value = tl.load(x + inputs + column, mask=there, other=0.0).to(tl.float32)
            a = a / (1.0 + tl.exp(-a)) * value
        if has_norm:
            squares += a * a
            a *= tl.load(norm + column, mask=there, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * a[None, :]
    product = tl.sum(total, axis=1)
    if has_norm:
        product *= tl.rsqrt(tl.sum(squares, axis=0) / inputs + eps)
    if has_bias:
        product += tl.load(bias + out, mask=is_out, other=0.0).to(tl.float32)
    product = product.to(output.dtype.element_ty)
    if has_residual:
        product += tl.load(residual + out, mask=is_out, other=0.0)
    tl.store(output + out, product, mask=is_out)


@triton.jit
def multiply_rows(
    x,
    weight,
    bias,
    residual,
    output,
    num_rows,
    outputs,
    inputs,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    is_even: tl.constexpr,
    overlaps: tl.constexpr,
):
    """Up to `rows` rows `[num_rows, inputs]`; one program for some outputs of all of them.

    Args:
        residual: `[num_rows, outputs]`, added to the product.
        is_even: `tile_inputs` divides `inputs`.
    """
    await_previous(overlaps)
    out = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    row = tl.arange(0, rows)
    is_out, is_row = out < outputs, row < num_rows
    weights = weight + out.to(tl.int64) * inputs
    total = tl.zeros([rows, tile_outputs], tl.float32)
    for first in range(0, inputs, tile_inputs):
        column = first + tl.arange(0, tile_inputs)
        if is_even:
            here, there = is_row[:, None], is_out[:, None]
        else:
            here = is_row[:, None] & (column < inputs)[None, :]
            there = is_out[:, None] & (column < inputs)[None, :]
        a = tl.load(x + row[:, None] * inputs + column[None, :], mask=here, other=0.0)
        w = tl.load(weights[:, None] + column[None, :], mask=there, other=0.0)
        total += tl.dot(a, tl.trans(w), input_precision="ieee")
    if has_bias:
        total += tl.load(bias + out, mask=is_out, other=0.0).to(tl.float32)[None, :]
    product = total.to(output.dtype.element_ty)
    to = row[:, None] * outputs + out[None, :]
    there = is_row[:, None] & is_out[None, :]
    if has_residual:
        product += tl.load(residual + to, mask=there, other=0.0)
    tl.store(output + to, product, mask=there)


@triton.jit
def rms_norm(
    x, weight, output, width, eps, wide: tl.constexpr, overlaps: tl.constexpr
):  # fmt: skip
    """Rows `[rows, width]`, one program each."""
    await_previous(overlaps)
    column = tl.arange(0, wide)
    there = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    row = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row, axis=0) / width + eps)
    scaled = row * factor * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(output + at, scaled.to(output.dtype.element_ty), mask=there)


@triton.jit
def silu_mul(x, output, width, tile: tl.constexpr, overlaps: tl.constexpr):
    """`silu(gate) * value` of rows `[rows, gate and value]`; one program for a part of a row."""
    await_previous(overlaps)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * tile + tl.arange(0, tile)
    there = column < width
    at = x + row * 2 * width + column
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    value = tl.load(at + width, mask=there, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(output + row * width + column, gated.to(output.dtype.element_ty), mask=there)
