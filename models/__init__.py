"""Pure torch: models, attention, caches, samplers. Knows no request, no server, no transport."""

from models.attention_metadata import AttentionMetadata as AttentionMetadata
from models.checkpoints.loader import load_model as load_model
from models.config import HeadConfig as HeadConfig
from models.config import ModelConfig as ModelConfig
from models.kv_cache import KVCache as KVCache
from models.transformer import Transformer as Transformer
