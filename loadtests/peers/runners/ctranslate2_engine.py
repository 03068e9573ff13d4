"""CTranslate2's generator, one static batch."""

import os

from protocol import Generate, Settings, serve


def load(settings: Settings) -> Generate:
    import ctranslate2
    from tokenizers import Tokenizer

    generator = ctranslate2.Generator(
        str(settings.prepared),
        device="cpu",
        compute_type=os.environ["RUNNER_TYPE"],
        inter_threads=1,
        intra_threads=settings.threads,
    )
    tokenizer = Tokenizer.from_file(str(settings.checkpoint / "tokenizer.json"))

    def generate(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[tokenizer.id_to_token(token) for token in prompt] for prompt in prompts],
            max_length=num_tokens,
            min_length=num_tokens,
            end_token=[],
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    serve(load, "ctranslate2")
