"""What Triton computes of a layer besides attention; the counterpart of `models.cpu.fused`."""

import torch
from torch import Tensor

from models.before import NOTHING, Before
from models.gpu.availability import why_unavailable

# More have so much to compute that a library's products are faster.
MAX_ROWS = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of a weight that a program multiplies at once, where it has one row ...
_TILE = 2048
# ... and how many programs there are at least: several for each multiprocessor.
_PROGRAMS = 640
_TILE_OUTPUTS, _TILE_INPUTS = 16, 256
# Tiles in flight, by the bytes of a number: what the shared memory of any GPU holds.
_STAGES = {2: 4, 4: 2}
_TILE_GATED = 1024


def can_fuse(*tensors: Tensor) -> bool:
    """Whether the operations here take these tensors; they have no gradients."""
    return (
        not torch.is_grad_enabled()
        and all(tensor.device.type == "cuda" and tensor.dtype in _DTYPES for tensor in tensors)
        and len({tensor.dtype for tensor in tensors}) == 1
        and why_unavailable(tensors[0].device) is None
    )


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` takes rows and weight, and is faster than torch's product."""
    return x.numel() <= MAX_ROWS * x.shape[-1] and weight.is_contiguous() and can_fuse(x, weight)


def is_one_row(x: Tensor) -> bool:
    """Whether `multiply` can do something before the product, too."""
    return x.numel() == x.shape[-1]


def multiply(
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    before: Before = NOTHING,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + before(x) @ weight.T + bias` of `[..., inputs]`, up to `MAX_ROWS` rows.

    Args:
        weight: `[outputs, inputs]`, contiguous.
        before: of one row only.
        residual: added to the result, which has been rounded to its type before.
    """
    from triton import cdiv

    from models.gpu.launch import launch_options
    from models.gpu.linear import multiply_row, multiply_rows

    outputs, inputs = weight.shape
    rows = x.contiguous()
    num_rows = x.numel() // x.shape[-1]
    output = x.new_empty((*x.shape[:-1], outputs))
    added = output if residual is None else residual.contiguous()  # else not read
    options = launch_options(x.device)
    if num_rows == 1:
        tile_outputs = _tile_outputs(outputs)
        multiply_row[(cdiv(outputs, tile_outputs),)](
            rows,
            weight,
            weight if bias is None else bias,
            weight if before.norm is None else before.norm,
            added,
            output,
            outputs,
            inputs,
            before.eps,
            has_bias=bias is not None,
            has_norm=before.norm is not None,
            has_swiglu=before.swiglu,
            has_residual=residual is not None,
            tile_outputs=tile_outputs,
            tile_inputs=_TILE // tile_outputs,
            num_warps=4,
            **options,
        )
        return output
    assert before == NOTHING, "of one row only"
    multiply_rows[(cdiv(outputs, _TILE_OUTPUTS),)](
        rows,
        weight,
        weight if bias is None else bias,
        added,
        output,
        num_rows,
        outputs,
        inputs,
        has_bias=bias is not None,
        has_residual=residual is not None,
        rows=MAX_ROWS,
        tile_outputs=_TILE_OUTPUTS,
        tile_inputs=_TILE_INPUTS,
        is_even=inputs % _TILE_INPUTS == 0,
        num_warps=2,
        num_stages=_STAGES[x.dtype.itemsize],
        **options,
    )
    return output


def _tile_outputs(outputs: int) -> int:
    """A power of two up to 8."""
    return min(8, 1 << (max(outputs // _PROGRAMS, 1).bit_length() - 1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last axis, in float32 until the end."""
    from triton import next_power_of_2

    from models.gpu.launch import launch_options
    from models.gpu.linear import rms_norm as kernel

    rows = x.contiguous()
    width = x.shape[-1]
    output = torch.empty_like(rows)
    kernel[(rows.numel() // width,)](
        rows, weight, output, width, eps, wide=next_power_of_2(width), **launch_options(x.device)
    )
    return output


def silu_mul(x: Tensor) -> Tensor:
    """`silu(gate) * value` of `[..., gate and value]`."""
    from triton import cdiv

    from models.gpu.launch import launch_options
    from models.gpu.linear import silu_mul as kernel

    rows = x.contiguous()
    width = x.shape[-1] // 2
    output = x.new_empty((*x.shape[:-1], width))
    kernel[(rows.numel() // x.shape[-1], cdiv(width, _TILE_GATED))](
        rows, output, width, tile=_TILE_GATED, **launch_options(x.device)
    )
    return output
