"""Tokenizers of the kinds that models bring, small and untrained, and text to try them with."""

import functools
from collections.abc import Callable, Sequence

from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from models.tokenizer import IncrementalDetokenizer, Tokenizer
from tests import checkpoints

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# One, two, three and four bytes of UTF-8, a joined emoji, a space, a newline.
ALPHABET = "abhelo \n\x00é€語😀\u200d👩"
_PIECES = ("▁", "a", "b", "h", "e", "l", "o", "é", "▁a", "▁h", "he", "ll", "ab", "ba", "aab", "bb")
_MERGES = (("▁", "a"), ("▁", "h"), ("h", "e"), ("l", "l"), ("a", "b"))


@functools.cache
def byte_level() -> Tokenizer:
    """One token per byte, as in GPT-2."""
    return checkpoints.headroom_byte_tokenizer()


def _byte_fallback_backend() -> Backend:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in (*(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES):
        vocab[token] = len(vocab)
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=list(_MERGES),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


@functools.cache
def llama() -> Tokenizer:
    """Spaces as `▁`, other characters as byte tokens, as in Llama 2."""
    backend = _byte_fallback_backend()
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


@functools.cache
def metaspace() -> Tokenizer:
    """The same vocabulary in the newer way of writing it."""
    backend = _byte_fallback_backend()
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    space = decoders.Metaspace("▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), space])
    return Tokenizer(backend)


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama": llama,
    "metaspace": metaspace,
}
# Their decoders join runs of byte tokens before they read them as UTF-8.
BYTE_FALLBACK = ("llama", "metaspace")

# Hypothesis tries strings of our own modules too; the names of special tokens are no text.
texts = st.text(ALPHABET, max_size=12) | st.text(max_size=8).filter(
    lambda text: not any(name in text for name in ("<bos>", "<eos>", "<pad>", "<unk>"))
)


def stream(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = (), min_tokens: int = 0
) -> tuple[list[str], str, str | None]:
    """What each token and the end release, and the stop string that was met."""
    detokenizer = IncrementalDetokenizer(tokenizer, stop, min_tokens=min_tokens)
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    return pieces, detokenizer.flush(), detokenizer.matched_stop
