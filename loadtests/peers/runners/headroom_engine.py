"""Our engine alone."""

import os

from protocol import Generate, Settings, serve


def load(settings: Settings) -> Generate:
    from service.engine.config import EngineConfig
    from service.engine.engine import Engine
    from service.engine.memory import load_configured_model
    from service.engine.sampling_params import SamplingParams

    config = EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_bytes,
        num_threads=settings.threads,
        weight_dtype="int8" if os.environ["RUNNER_TYPE"] == "int8" else "auto",
    )
    engine = Engine(load_configured_model(settings.checkpoint, config), config)

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        return [list(output.token_ids) for output in engine.generate(prompts, params)]

    return generate


if __name__ == "__main__":
    serve(load, "headroom", "torch")
