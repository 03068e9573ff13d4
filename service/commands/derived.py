"""What `headroom convert` and `headroom prune` have in common: a checkpoint made of another."""

import json
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.console import err, fail, out

if TYPE_CHECKING:
    from torch import Tensor

    from models.config import ModelConfig
    from models.cpu.linear import WeightDType
    from models.heads.fidelity import Fidelity
    from models.tokenizer import Tokenizer
    from models.transformer import Transformer

SourceModel = Annotated[
    str, typer.Option(help="Directory with the checkpoint, or a bundled model, such as demo.")
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        help="Text to calibrate with, its last tenth to report on "
        "[default: Python's standard library]."
    ),
]
CalibrationTokens = Annotated[int, typer.Option(min=256)]
MaxKL = Annotated[
    float, typer.Option(min=0, help="Up to this divergence, in nats, it counts as ready.")
]

# Files of the original that hold for what is made of it too.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
# Fields of its config.json that the model does without.
_TOKEN_IDS = "bos_token_id", "pad_token_id"
_SEQ_LEN = 256
_HELD_OUT_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Original:
    """The model that something is made of, and text to do it with.

    Attributes:
        calibration, held_out: texts; what is reported is of those that are held out.
    """

    path: Path
    model: "Transformer"
    tokenizer: "Tokenizer"
    calibration: list[str]
    held_out: list[str]

    @classmethod
    def load(cls, name: str, text: Path | None) -> "Original":
        """Raises ModelError or OSError."""
        from models.checkpoints.bundled import checkpoint_directory
        from models.checkpoints.loader import load_model
        from models.errors import ConfigError
        from models.tokenizer import Tokenizer

        path = checkpoint_directory(name)
        model = load_model(path)
        if not model.config.is_causal:
            raise ConfigError("family", model.config.family, "a decoder, which predicts tokens")
        return cls(path, model, Tokenizer.for_model(path, model.config), *_texts(text))

    def check_format(self) -> None:
        """Whether what is made of it can be written, before anything is measured.

        Raises:
            ConfigError: it cannot.
        """
        from models.checkpoints.writer import check_exportable

        check_exportable(self.model.config)

    def batches(self, num_tokens: int) -> "list[Tensor]":
        """Rows of the text to calibrate with, int64 `[batch, tokens]` each."""
        return self._rows(self.calibration, num_tokens)

    def held_out_batches(self) -> "list[Tensor]":
        return self._rows(self.held_out, _HELD_OUT_TOKENS)

    def _rows(self, texts: list[str], num_tokens: int) -> "list[Tensor]":
        from models.heads.text import text_batches

        seq_len = min(_SEQ_LEN, self.model.config.max_position_embeddings)
        return text_batches(self.tokenizer, texts, num_tokens=num_tokens, seq_len=seq_len)


@dataclass(frozen=True, slots=True)
class Derived:
    """What was written, beside what it was made of.

    Attributes:
        configs, parameters, file_bytes: of the original and of the other.
        weight_dtype: that of the other in its file; `auto` is the original's.
        fidelity: measured on the weights as they were read back.
    """

    path: Path
    configs: "tuple[ModelConfig, ModelConfig]"
    parameters: tuple[int, int]
    file_bytes: tuple[int, int]
    weight_dtype: "WeightDType"
    fidelity: "Fidelity"

    @classmethod
    def write(
        cls, original: Original, model: "Transformer", path: Path, dtype: "WeightDType" = "auto"
    ) -> "Derived":
        """Raises ModelError, OSError or SafetensorError."""
        from models.checkpoints.config_json import read_json
        from models.checkpoints.history import Step, read_history, write_history
        from models.checkpoints.loader import load_model, weight_files
        from models.checkpoints.writer import check_exportable, save_model
        from models.heads.fidelity import compare

        check_exportable(model.config)
        unseen = original.held_out_batches()
        step = Step(path.resolve().name, shlex.join(["headroom", *sys.argv[1:]]))
        history = [*read_history(original.path), step]
        path.mkdir(parents=True, exist_ok=True)
        for name in _COPIED:
            if (original.path / name).exists():
                shutil.copyfile(original.path / name, path / name)
        write_history(path, history)
        # Last, because a directory that holds a model is not written to again.
        fields = read_json(original.path / "config.json")
        token_ids = {name: fields[name] for name in _TOKEN_IDS if name in fields}
        save_model(model, path, weight_dtype=dtype, token_ids=token_ids)
        saved = load_model(path)
        with err.status("comparing"):
            fidelity = compare(original.model, saved, unseen)
        before, after = (
            sum(file.stat().st_size for file in weight_files(directory))
            for directory in (original.path, path)
        )
        return cls(
            path,
            (original.model.config, saved.config),
            (original.model.num_parameters, saved.num_parameters),
            (before, after),
            dtype,
            fidelity,
        )

    def print_json(self, max_kl: float, **more: Any) -> None:
        names = "original", "converted"
        kv_bytes = [config.kv_bytes_per_token() for config in self.configs]
        fields = {
            "output": str(self.path),
            "heads": self.configs[1].head_label,
            **more,
            "parameters": dict(zip(names, self.parameters, strict=True)),
            "kv_bytes_per_token": dict(zip(names, kv_bytes, strict=True)),
            "file_bytes": dict(zip(names, self.file_bytes, strict=True)),
            "only_headroom_reads_it": _why_only_ours(self.configs[1]),
            **asdict(self.fidelity),
            "ready": self.fidelity.kl <= max_kl,
        }
        print(json.dumps(fields))

    def print(self, max_kl: float, *more: str) -> None:
        """A report for people, with lines of the command's own."""
        before, after = (config.kv_bytes_per_token() for config in self.configs)
        labels = " -> ".join(config.head_label for config in self.configs)
        fidelity = self.fidelity
        out.print(f"heads   {labels}")
        for line in more:
            out.print(line)
        out.print(f"format  {self._readers()}")
        parameters = " -> ".join(f"{number / 1e6:.2f}" for number in self.parameters)
        out.print(f"kv      {before:,} -> {after:,} bytes per token, {1 - after / before:.0%} less")
        sizes = " -> ".join(f"{size / 1e6:.2f}" for size in self.file_bytes)
        out.print(f"weights {parameters} M parameters, {sizes} MB")
        out.print(
            f"loss    {fidelity.original_loss:.4f} -> {fidelity.changed_loss:.4f} nats per token"
        )
        out.print(f"kl      {fidelity.kl:.4f} nats, same first choice {fidelity.agreement:.1%}")
        if fidelity.kl <= max_kl:
            out.print(f"ready   {self.path}")
        else:
            out.print(
                f"not ready: kl is above {max_kl:g}; a trained model that was changed normally "
                f"needs uptraining\n{self.path}"
            )

    def _readers(self) -> str:
        if (reason := _why_only_ours(self.configs[1])) is not None:
            return f"only Headroom reads it: {reason}"
        if self.weight_dtype == "int8":
            return "transformers reads it too, with its package compressed-tensors"
        return "transformers reads it too"


def _why_only_ours(config: "ModelConfig") -> str | None:
    """What transformers' Llama cannot say of a model; None if there is nothing."""
    if config.projection_rank is not None:
        return "its projections have a rank"
    if len({(heads.num_heads, heads.num_kv_heads) for heads in config.layers}) > 1:
        return "its layers have different numbers of heads"
    if config.hidden_size % config.layers[0].num_heads:
        return (
            f"its width {config.hidden_size} is no multiple of {config.layers[0].num_heads} heads"
        )
    return None


def refuse_existing(output: Path) -> None:
    """Exit unless a model can be written there without loss."""
    if (output / "config.json").exists():
        fail(f"--output is {output}, which holds a model; allowed: another directory", code=2)


def _texts(file: Path | None) -> tuple[list[str], list[str]]:
    """What to calibrate with, and what to report on.

    Raises:
        CorpusError: the file is not UTF-8.
        OSError: it cannot be read.
    """
    from models.errors import CorpusError
    from models.train.corpus import build_corpus
    from models.train.sources import STANDARD_LIBRARY

    if file is None:
        corpus = build_corpus(Path(), (STANDARD_LIBRARY,))
        return corpus.texts("train"), corpus.texts("held_out")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is no UTF-8 text: {error}") from error
    cut = len(text) * 9 // 10
    return [text[:cut]], [text[cut:]]
