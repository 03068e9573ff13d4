"""Numbers on their way between host and device, without either waiting for the other."""

import torch
from torch import Tensor


def send(numbers: Tensor, device: torch.device) -> Tensor:
    """The same numbers on a device; on a GPU they arrive before what is launched later reads them.

    The allocator of pinned memory keeps it until the copy is done.
    """
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


class Received:
    """Copies for the host, begun now; `wait` gives them once the device has come so far."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors and tensors[0].is_cuda:
            self._tensors = tuple(
                torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
