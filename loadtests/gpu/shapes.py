"""The models that are measured on a GPU, and what a step of them has to read."""

from dataclasses import replace

import torch

from models.config import ModelConfig
from models.kernels import KernelName
from models.transformer import Transformer
from service.bench import BenchShape

# Multi-head, grouped-query, multi-query of each; of the second, what Llama 3.2 1B has, but for the
# key/value heads.
HALF = BenchShape(24, 1280, 3584, 20, 20, 64, 32_000, "bfloat16")
ONE = BenchShape(16, 2048, 8192, 32, 32, 64, 128_256, "bfloat16")
SHAPES = {
    f"{name}-{kv_heads}kv": replace(shape, kv_heads=kv_heads)
    for name, shape, heads in (("0.5B", HALF, (20, 5, 1)), ("1B", ONE, (32, 8, 1)))
    for kv_heads in heads
}


def random_on_device(
    config: ModelConfig, device: torch.device, kernel: KernelName = "paged_triton"
) -> Transformer:
    """A model of random weights, made where it runs: the host would take minutes for them."""
    with torch.device(device):
        model = Transformer(config, kernel=kernel)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.to(getattr(torch, config.dtype)).eval()


def step_bytes(model: Transformer, batch: int, context: int) -> int:
    """What a step of decodes reads at least: every weight, and every key and value."""
    return model.step_bytes + batch * model.config.kv_bytes(context)
