"""Whether an engine records its decode steps, and does so when it starts."""

import logging

from models.gpu.decode_graphs import Capture, CudaCapture, DecodeGraphs, why_uncapturable
from models.kv_cache import KVCache
from models.transformer import Transformer
from service.engine.config import EngineConfig

log = logging.getLogger(__name__)


def record_decodes(
    model: Transformer,
    kv_cache: KVCache,
    config: EngineConfig,
    max_model_len: int,
    capture: Capture | None,
) -> DecodeGraphs | None:
    """Recorded steps for all batches that the engine may run; None where there are none, which is
    said in the log of an engine on a GPU.

    Args:
        capture: how to record; None is as CUDA graphs, on a GPU.
    """
    if not config.cuda_graphs or (capture is None and model.device.type != "cuda"):
        return None
    reason = why_uncapturable(model, kv_cache)
    if reason is not None:
        log.warning("decode steps are not recorded: %s", reason)
        return None
    return DecodeGraphs(
        model,
        kv_cache,
        max_num_seqs=config.max_num_seqs,
        max_length=max_model_len,
        capture=capture or CudaCapture(),
        progress=lambda done, total: log.info("recorded decode steps: %d of %d", done, total),
    )
