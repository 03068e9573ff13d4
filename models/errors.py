"""What can go wrong while a model is described, loaded or given text.

ModelError
├── ConfigError        a field of a model or head configuration has a value that cannot work
├── CheckpointError    the files do not hold the model that the configuration describes
└── TokenizerError     the tokenizer is missing, unreadable or does not belong to the model
"""


class ModelError(ValueError):
    """Base of all errors that the user of `models` can cause."""


class ConfigError(ModelError):
    """A configuration field has a value that cannot work.

    Attributes:
        field: name of the field, as it is written in the configuration.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        super().__init__(f"{field} is {value!r}; allowed: {allowed}")


class CheckpointError(ModelError):
    """Files of a checkpoint are missing, damaged, or hold other tensors than expected."""


class TokenizerError(ModelError):
    """The tokenizer is missing, unreadable, or does not fit the model."""
