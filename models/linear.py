"""Linear layers, and how their weights lie in memory."""

from torch import Tensor, nn

from models.cpu.linear import can_pack, pack, packed_linear, unpack


class Linear(nn.Linear):
    """nn.Linear, whose weight may be packed: `weight` then has one dimension, and as many
    elements in the order in which the processor reads them."""

    def pack(self) -> None:
        """Keep the packed weight instead, where that is faster; for inference only."""
        if self.weight.dim() == 2 and can_pack(self.weight):
            self.weight = nn.Parameter(pack(self.weight.detach()), requires_grad=False)

    @property
    def dense_weight(self) -> Tensor:
        """The weight `[outputs, inputs]`; a copy if it is packed."""
        if self.weight.dim() == 2:
            return self.weight
        return unpack(self.weight, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return super().forward(x)
        return packed_linear(x, self.weight, self.bias)
