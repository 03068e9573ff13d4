"""transformers' own generation: one static batch, or its continuous batching."""

import os

from protocol import Generate, Settings, serve


def load(settings: Settings) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(settings.threads)
    continuous = os.environ["RUNNER_TYPE"] == "continuous"
    model = AutoModelForCausalLM.from_pretrained(
        settings.checkpoint, dtype="bfloat16", attn_implementation="sdpa"
    )

    def config(num_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )

    @torch.inference_mode()
    def static(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        inputs = torch.tensor(prompts)
        tokens = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config(num_tokens),
            cache_implementation="static",
            disable_compile=True,
        )
        return [row[inputs.shape[1] :] for row in tokens.tolist()]

    def batched(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        results = model.generate_batch(
            prompts, generation_config=config(num_tokens), persistent_manager=True
        )
        # Named req_0, req_1 ... in the order of the prompts; they may end in another.
        ordered = sorted(results, key=lambda name: int(name.rpartition("_")[2]))
        return [results[name].generated_tokens for name in ordered]

    return batched if continuous else static


if __name__ == "__main__":
    serve(load, "transformers", "torch")
