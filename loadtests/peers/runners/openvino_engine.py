"""OpenVINO GenAI's continuous batching."""

from protocol import Generate, Settings, serve


def load(settings: Settings) -> Generate:
    import numpy
    import openvino
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    scheduler = SchedulerConfig()
    scheduler.max_num_seqs = settings.max_num_seqs
    scheduler.cache_size = -(-settings.kv_cache_bytes // 2**30)
    scheduler.enable_prefix_caching = False
    pipeline = ContinuousBatchingPipeline(
        str(settings.prepared),
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16",
            "KV_CACHE_PRECISION": "bf16",
            "INFERENCE_NUM_THREADS": settings.threads,
        },
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True, do_sample=False)
        inputs = [openvino.Tensor(numpy.array([prompt], numpy.int64)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    serve(load, "openvino", "openvino-genai")
