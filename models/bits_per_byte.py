"""How well a model predicts texts, in a unit that does not depend on its tokenizer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import cross_entropy

from models.tokenizer import Tokenizer
from models.transformer import Transformer

MAX_WINDOW = 1024


@torch.inference_mode()
def bits_per_byte(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    on_bytes: Callable[[float], None] = lambda _: None,
) -> float:
    """Compression of texts by the model: its loss in bits over the UTF-8 bytes of the texts.

    Long texts are cut into windows of the model's context, of 1,024 tokens at most. Each is scored
    on its own, behind what the tokenizer puts before a text; where that is nothing, the first token
    of a window costs nothing.

    Args:
        on_bytes: told how many bytes were scored, window by window.
    """
    begin = tokenizer.encode("")
    width = min(model.config.max_position_embeddings, MAX_WINDOW) - len(begin)
    nats, num_bytes = 0.0, 0
    for text in texts:
        size = len(text.encode())
        num_bytes += size
        ids = tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, len(ids), width):
            scored = ids[start : start + width]
            window = torch.tensor(begin + scored, device=model.device)
            targets = window[max(len(begin), 1) :]
            if len(targets):
                logits = model.logits(window[None, :-1])[0, -len(targets) :]
                nats += float(cross_entropy(logits, targets, reduction="sum"))
            on_bytes(size * len(scored) / len(ids))
    return nats / math.log(2) / num_bytes
