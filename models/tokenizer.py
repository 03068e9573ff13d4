"""Text to token ids and back, whole or token by token. Knows no tensor."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from models.config import ModelConfig
from models.errors import TokenizerError

# UTF-8 has at most four bytes per character, and a token is at least one byte.
_MAX_TOKENS_PER_CHARACTER = 4


class Tokenizer:
    """The tokenizer of a checkpoint directory (its tokenizer.json)."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        # A published tokenizer.json may carry the settings of its training run.
        self._backend.no_truncation()
        self._backend.no_padding()

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Read tokenizer.json.

        Raises:
            TokenizerError: the file is missing or not a tokenizer.
        """
        return cls(read_tokenizer(path))

    @classmethod
    def for_model(cls, path: str | Path, config: ModelConfig) -> "Tokenizer":
        """Read tokenizer.json and check that the model knows all of its tokens.

        Raises:
            TokenizerError: see `from_directory`, or the model's vocabulary is smaller.
        """
        tokenizer = cls.from_directory(path)
        if tokenizer.vocab_size > config.vocab_size:
            raise TokenizerError(
                f"{Path(path) / 'tokenizer.json'} has token ids up to {tokenizer.vocab_size - 1}; "
                f"the model's vocab_size is {config.vocab_size}"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def num_bytes(self, token_id: int) -> int:
        """UTF-8 bytes that a token stands for on its own; a special token stands for none."""
        text = self._backend.decode([token_id], skip_special_tokens=True)
        if "\ufffd" not in text:
            return len(text.encode())
        # Part of a character: written as <0xE6>, or with one letter per byte.
        token = self.token_of(token_id) or ""
        return 1 if token.startswith("<0x") else len(token)

    def token_of(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, None for an id without one."""
        return self._backend.id_to_token(token_id)

    def decode_stream(self, context: Sequence[int] = ()) -> "DecodeStream":
        """A decoder of what follows the tokens of `context`."""
        return DecodeStream(ids=list(context), skip_special_tokens=True)

    def step(self, stream: "DecodeStream", token_id: int) -> str:
        """Text that `token_id` completes; empty while bytes of a character are missing."""
        return stream.step(self._backend, token_id) or ""


def read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer.json of a directory, as it is written.

    Raises:
        TokenizerError: the file is missing or not a tokenizer.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{file} is missing; the model cannot be given text without it")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"{file} is not a tokenizer: {error}") from error


class IncrementalDetokenizer:
    """Turns a growing sequence of token ids into text that is never taken back.

    Text is held back while it may still change: bytes of an unfinished UTF-8 character, and an
    ending that may become a stop string. The stop string itself is not part of the text.

    Args:
        stop: strings that end the text.
        prompt_token_ids: what the tokens continue; decides whether a first word has a space.
        min_tokens: text of the first so many tokens is not searched for stop strings.

    Attributes:
        matched_stop: the stop string that was met, if any; nothing is emitted after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self.matched_stop: str | None = None
        self._tokenizer = tokenizer
        self._context = _whole_ending(tokenizer, prompt_token_ids)
        self._num_context_chars = len(tokenizer.decode(self._context))
        self._stream = tokenizer.decode_stream(self._context)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._token_ids: list[int] = []
        self._num_decoded_chars = 0
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these further tokens complete."""
        pieces: list[str] = []
        for token_id in token_ids:
            if self.matched_stop is not None:
                break
            self._token_ids.append(token_id)
            decoded = self._decode(token_id)
            self._num_decoded_chars += len(decoded)
            if decoded:
                pieces.append(self._release(decoded))
        return "".join(pieces)

    def flush(self) -> str:
        """The rest, when no more tokens follow: an unfinished character becomes U+FFFD."""
        if self.matched_stop is not None:
            return ""
        released = self._release(self._undecoded())
        rest, self._held = self._held, ""
        return released if self.matched_stop is not None else released + rest

    def _decode(self, token_id: int) -> str:
        """Text that the newest token completes."""
        try:
            return self._tokenizer.step(self._stream, token_id)
        except Exception:
            # Byte-fallback decoders rewrite a run of bytes that turns out to be no UTF-8, and the
            # stream gives up. What is out stays out; the rest is decoded anew.
            self._stream = self._tokenizer.decode_stream()
            self._tokenizer.step(self._stream, token_id)
            return self._undecoded()

    def _undecoded(self) -> str:
        """Text of all tokens beyond what has been decoded."""
        whole = self._tokenizer.decode([*self._context, *self._token_ids])
        return whole[self._num_context_chars + self._num_decoded_chars :]

    def _release(self, decoded: str) -> str:
        """Add decoded text to what is held back; return what no stop string can claim."""
        if not self._stop or len(self._token_ids) <= self._min_tokens:
            return decoded
        text = self._held + decoded
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            position, self.matched_stop = min(found)
            self._held = ""
            return text[:position]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _whole_ending(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt that are whole characters; none if it ends inside of one."""
    for length in range(1, _MAX_TOKENS_PER_CHARACTER + 1):
        ending = list(token_ids[-length:])
        if "\ufffd" not in tokenizer.decode(ending):
            return ending
    return []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that `stop` starts with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
