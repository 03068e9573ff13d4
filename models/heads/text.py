"""Text as rows of tokens for calibration and measurement."""

from collections.abc import Iterable

import torch
from torch import Tensor

from models.errors import TokenizerError
from models.tokenizer import Tokenizer

_ROWS_PER_BATCH = 8


def text_batches(
    tokenizer: Tokenizer, texts: Iterable[str], *, num_tokens: int, seq_len: int
) -> list[Tensor]:
    """Rows of `seq_len` tokens that are spread evenly over all texts, about `num_tokens` in all or
    what there is; int64 `[8 or fewer, seq_len]` each.

    Each row begins as every prompt does, with what the tokenizer puts before a text.

    Raises:
        TokenizerError: the texts do not fill one row.
    """
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    begin = tokenizer.encode("")
    width = seq_len - len(begin)
    if len(ids) < width:
        raise TokenizerError(f"the text has {len(ids)} tokens; allowed: {width} or more")
    num_rows = min(max(num_tokens // seq_len, 1), len(ids) // width)
    stride = len(ids) // num_rows
    rows = [begin + ids[start : start + width] for start in range(0, num_rows * stride, stride)]
    return list(torch.tensor(rows).split(_ROWS_PER_BATCH))
