"""The model families, by the `model_type` of their config.json.

A family is data: a function from fields to `ModelConfig`, and a table of names. Adding one adds
no class.
"""

from models.checkpoints.families.bert import BERT
from models.checkpoints.families.bloom import BLOOM, MPT
from models.checkpoints.families.cohere import COHERE
from models.checkpoints.families.falcon import FALCON
from models.checkpoints.families.family import Family
from models.checkpoints.families.gemma import GEMMA, GEMMA2, GEMMA3
from models.checkpoints.families.gpt2 import GPT2, GPT_BIGCODE
from models.checkpoints.families.gpt_neox import GPT_NEOX, GPTJ
from models.checkpoints.families.gpt_oss import GPT_OSS
from models.checkpoints.families.granite import GRANITE
from models.checkpoints.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from models.checkpoints.families.olmo2 import OLMO2
from models.checkpoints.families.opt import OPT
from models.checkpoints.families.phi import PHI, PHI3
from models.checkpoints.families.stablelm import STABLELM

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi": PHI,
    "phi3": PHI3,
    "gpt2": GPT2,
    "gpt_bigcode": GPT_BIGCODE,
    "gpt_neox": GPT_NEOX,
    "gptj": GPTJ,
    "falcon": FALCON,
    "bloom": BLOOM,
    "mpt": MPT,
    "opt": OPT,
    "stablelm": STABLELM,
    "olmo2": OLMO2,
    "cohere": COHERE,
    "granite": GRANITE,
    "gpt_oss": GPT_OSS,
    "bert": BERT,
}
