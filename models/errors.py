"""What can go wrong while a model is described, loaded or given text.

ModelError
├── ConfigError        a field of a model or head configuration has a value that cannot work
├── InputError         tensors given to attention cannot be computed with
│   ├── ShapeError     their shapes do not fit each other, or only after a transposition
│   └── MaskError      a mask has another shape, type or polarity than it must have
├── CheckpointError    the files do not hold the model that the configuration describes
├── TokenizerError     the tokenizer is missing, unreadable or does not belong to the model
├── CorpusError        text to train on is missing, or is not what was recorded
└── TrainingError      a training cannot begin, go on, or be kept
"""


class ModelError(ValueError):
    """Base of all errors that the user of `models` can cause."""


class ConfigError(ModelError):
    """A configuration field has a value that cannot work.

    Attributes:
        field: name of the field, as it is written in the configuration.
        meant: what the caller probably wanted to write, where that can be told.
    """

    def __init__(self, field: str, value: object, allowed: str, meant: str | None = None) -> None:
        self.field = field
        self.meant = meant
        super().__init__(_message(field, f"is {value!r}", allowed, meant))


class InputError(ModelError):
    """A tensor given to attention cannot be computed with, or cannot be what was meant.

    Attributes:
        field: name of the argument.
        meant: what the caller probably wanted to write, where that can be told.
    """

    def __init__(self, field: str, found: str, allowed: str, meant: str | None = None) -> None:
        self.field = field
        self.meant = meant
        super().__init__(_message(field, found, allowed, meant))


class ShapeError(InputError):
    """Tensors have shapes that do not fit each other, or only after a transposition."""


class MaskError(InputError):
    """A mask has another shape, type or polarity than it must have."""


class CheckpointError(ModelError):
    """Files of a checkpoint are missing, damaged, or hold other tensors than expected."""


class TokenizerError(ModelError):
    """The tokenizer is missing, unreadable, or does not fit the model."""


class CorpusError(ModelError):
    """Text to train on is missing, or is not what was recorded."""


class TrainingError(ModelError):
    """A training cannot begin, go on, or be kept."""


def _message(field: str, found: str, allowed: str, meant: str | None) -> str:
    hint = "" if meant is None else f"; you probably meant {meant}"
    return f"{field} {found}; allowed: {allowed}{hint}"
