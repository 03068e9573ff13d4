"""The model families, by the `model_type` of their config.json.

A family is data: a function from fields to `ModelConfig`, and a table of names. Adding one adds
no class.
"""

from models.checkpoints.families.family import Family
from models.checkpoints.families.gpt2 import GPT2
from models.checkpoints.families.llama import LLAMA

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "gpt2": GPT2,
}
