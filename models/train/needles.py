"""Keys and their values in a text, and the keys once more: what only retrieval can answer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

NUM_NEEDLES = 4
VALUES = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet",
    "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango",
    "uniform", "victor", "whiskey", "yankee", "zulu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """The value of a key that is asked for.

    Attributes:
        start: its first token.
        found: the same token in the needle.
        length: of both, in tokens.
    """

    start: int
    found: int
    length: int


@dataclass(frozen=True, slots=True)
class NeedleRow:
    """`key 7341 is alpha` and others like it in a text, and at its end the keys once more.

    Attributes:
        ids: int64 `[tokens]`.
        answers: all that can be known of the end.
    """

    ids: Tensor
    answers: tuple[Answer, ...]

    @property
    def known(self) -> Tensor:
        """Which tokens belong to an answer, bool `[tokens]`."""
        known = torch.zeros(len(self.ids), dtype=torch.bool)
        for answer in self.answers:
            known[answer.start : answer.start + answer.length] = True
        return known


def needle_row(
    tokenizer: Tokenizer,
    length: int,
    text: Callable[[int, torch.Generator], Tensor],
    generator: torch.Generator,
) -> NeedleRow | None:
    """A row of `length` tokens, or None if it has no room for needles.

    Args:
        text: so many tokens of text, int64, the first of which is `<bos>`.
    """

    def encode(words: str) -> list[int]:
        ids: list[int] = tokenizer.encode(words, add_special_tokens=False).ids
        return ids

    keys = torch.randint(1000, 10_000, (NUM_NEEDLES,), generator=generator).tolist()
    values = torch.randint(len(VALUES), (NUM_NEEDLES,), generator=generator).tolist()
    questions = [encode(f"\nkey {key} is") for key in keys]
    answers = [encode(f" {VALUES[value]}") for value in values]
    needles = [question + answer for question, answer in zip(questions, answers, strict=True)]
    line_end = encode("\n")
    order = torch.randperm(NUM_NEEDLES, generator=generator).tolist()
    room = length - 2 * sum(map(len, needles)) - NUM_NEEDLES * len(line_end)
    if room < NUM_NEEDLES + 1:
        return None
    hay = text(room, generator).tolist()
    cuts = sorted(torch.randint(1, room + 1, (NUM_NEEDLES,), generator=generator).tolist())
    ids: list[int] = hay[: cuts[0]]
    found: list[int] = []
    for index, (start, end) in enumerate(zip(cuts, [*cuts[1:], room], strict=True)):
        found.append(len(ids) + len(questions[index]))
        ids += needles[index] + line_end + hay[start:end]
    asked: list[Answer] = []
    for index in order:
        asked.append(Answer(len(ids) + len(questions[index]), found[index], len(answers[index])))
        ids += needles[index]
    return NeedleRow(torch.tensor(ids), tuple(asked))
