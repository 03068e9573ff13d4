"""The tokenizer of the demo models, and texts as token ids."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE whose texts begin with `<bos>`; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """All documents behind one another, each as `<bos> ... <eos>`; int32 `[tokens]`."""
    parts: list[Tensor] = []
    for start in range(0, len(texts), 64):  # a list of all ids as objects would be large
        for encoding in tokenizer.encode_batch(list(texts[start : start + 64])):
            parts.append(torch.tensor([*encoding.ids, EOS], dtype=torch.int32))
    return torch.cat(parts)
