"""NumPy arrays and torch tensors to AttentionService and back."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Required, TypeAlias, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from protos.headroom.v1 import attention_pb2 as pb
from protos.headroom.v1.tensor_pb2 import Tensor as TensorMessage
from service.tensors import WireArray

if TYPE_CHECKING:
    import torch

A = TypeVar("A", npt.NDArray[Any], "torch.Tensor")
AnyArray: TypeAlias = "npt.NDArray[Any] | torch.Tensor"
Layout: TypeAlias = Literal[
    "batch_heads_tokens_dim", "batch_tokens_heads_dim", "tokens_batch_heads_dim"
]
Mask: TypeAlias = Literal["causal", "bidirectional", "prefix"]


class Attending(TypedDict, total=False):
    """How an attention is computed, and what is returned beside its output.

    `want_head_outputs` needs the implementation `split`.
    """

    implementation: Literal["fused", "split"]
    want_weights: bool
    want_lse: bool
    want_head_outputs: bool


class AttentionVariant(Attending, total=False):
    """Fields of `headroom.v1.Variant`; see attention.proto for their meaning.

    `window` is one for all heads or one for each query head, where None is all; `alibi` is the
    slopes or the whole message.
    """

    mask: Required[Mask]
    prefix_lengths: Sequence[int]
    segment_ids: AnyArray
    key_lengths: Sequence[int]
    visible: AnyArray
    bias: AnyArray
    window: int | Sequence[int | None]
    sink_tokens: int
    scale: float
    temperature: Sequence[float]
    softcap: float
    sinks: Sequence[float]
    alibi: Sequence[float] | pb.Alibi
    rope: pb.Rope
    query_positions: AnyArray
    key_positions: AnyArray


@dataclass(frozen=True, slots=True, eq=False)
class Attended(Generic[A]):
    """What an attention answered; arrays of the kind that was given.

    Attributes:
        output: as `headroom.v1.AttendResponse.output`; bfloat16 becomes float32 in NumPy, which
            has no such type.
        weights, lse, head_outputs: if asked for.
        backend: the implementation that ran.
    """

    output: A
    weights: A | None
    lse: A | None
    head_outputs: A | None
    backend: str


def attend_request(
    query: A, key: A, value: A, layout: Layout, variant: Mapping[str, Any]
) -> pb.AttendRequest:
    qkv = pb.QKV(
        query=_message(query),
        key=_message(key),
        value=_message(value),
        layout=f"LAYOUT_{layout.upper()}",
    )
    attending = {name: variant[name] for name in Attending.__annotations__ if name in variant}
    others = {name: value for name, value in variant.items() if name not in attending}
    return pb.AttendRequest(qkv=qkv, variant=_variant(others), **_attending(attending))


def hidden_request(hidden: A, layer: int, attending: Mapping[str, Any]) -> pb.AttendRequest:
    given = pb.HiddenInput(hidden=_message(hidden), layer=layer)
    return pb.AttendRequest(hidden=given, **_attending(attending))


def attended(response: pb.AttendResponse, like: A) -> Attended[A]:
    def optional(name: Literal["weights", "lse", "head_outputs"]) -> A | None:
        return _array(getattr(response, name), like) if response.HasField(name) else None

    return Attended(
        output=_array(response.output, like),
        weights=optional("weights"),
        lse=optional("lse"),
        head_outputs=optional("head_outputs"),
        backend=response.backend,
    )


def _attending(attending: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(attending)
    if "implementation" in fields:
        fields["implementation"] = f"IMPLEMENTATION_{fields['implementation'].upper()}"
    return fields


def _variant(given: Mapping[str, Any]) -> pb.Variant:
    fields = dict(given)
    fields["mask"] = f"MASK_KIND_{fields['mask'].upper()}"
    for name in ("segment_ids", "visible", "bias", "query_positions", "key_positions"):
        if name in fields:
            fields[name] = _message(fields[name])
    window = fields.get("window")
    if window is not None and not isinstance(window, int):
        del fields["window"]
        fields["head_windows"] = [each or 0 for each in window]
    alibi = fields.get("alibi")
    if alibi is not None and not isinstance(alibi, pb.Alibi):
        fields["alibi"] = pb.Alibi(slopes=alibi)
    return pb.Variant(**fields)


def _message(array: AnyArray) -> TensorMessage:
    if _is_torch(array):
        return _of_torch(array).to_message()
    values = np.asarray(array)
    if values.dtype.kind in "iu":
        values = values.astype(np.int64, casting="safe")
    return WireArray(values.dtype.name, values).to_message()


def _array(tensor: TensorMessage, like: A) -> A:
    array = WireArray.of(tensor)
    return _to_torch(array, like) if _is_torch(like) else array.widened()  # type: ignore[return-value]


def _is_torch(array: object) -> bool:
    """Without importing torch: nobody has a tensor before somebody has."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _of_torch(tensor: Any) -> WireArray:
    import torch

    stored = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        stored = stored.view(torch.int16)
    name = str(tensor.dtype).removeprefix("torch.")
    values = stored.numpy()
    return WireArray(name, values.view(np.uint16) if name == "bfloat16" else values)


def _to_torch(array: WireArray, like: Any) -> Any:
    import torch

    if array.dtype == "bfloat16":
        bits = torch.from_numpy(array.values.astype(np.uint16).view(np.int16))
        return bits.view(torch.bfloat16).to(like.device)
    return torch.from_numpy(array.widened()).to(like.device)
