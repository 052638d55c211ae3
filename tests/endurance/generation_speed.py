"""How fast answers are made beside transformers' own `generate`, on this machine's CPU.

    python -m tests.endurance.generation_speed

A Llama of 58M random parameters answers 256 prompts of 8 to 64 tokens with up to 256 tokens, greedily, in batches of
32. One token in 150 of the vocabulary ends an answer, so that answers end at all lengths, as real ones do. Both make
the same tokens, which is checked. Takes about five minutes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

PROMPTS, NEW_TOKENS, BATCH = 256, 256, 32
VOCABULARY = 32_000
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    random = np.random.default_rng(0)
    prompts = [random.integers(3, VOCABULARY, length).tolist() for length in random.integers(8, 65, PROMPTS)]
    stop_ids = sorted(random.choice(VOCABULARY, VOCABULARY // 150, replace=False).tolist())
    with tempfile.TemporaryDirectory() as directory:
        contenders = {"transformers": torch_answers(Path(directory)), "derta_jax": jax_answers(Path(directory))}
        made: dict[str, list[list[int]]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for round in range(repeats + 1):
            for name, answer in contenders.items():
                started = time.monotonic()
                made[name] = answer(prompts, stop_ids)
                if round:  # the first warms up and compiles
                    seconds[name].append(time.monotonic() - started)
                print(f"round {round} {name}: {time.monotonic() - started:.1f} s", flush=True)
    theirs, ours = made["transformers"], made["derta_jax"]
    same = sum(a == b for a, b in zip(theirs, ours, strict=True))
    lengths = [len(answer) for answer in ours]
    print(f"{same} of {PROMPTS} answers are the same, token for token")
    print(f"answers of {min(lengths)} to {max(lengths)} tokens, mean {np.mean(lengths):.0f}")
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {sum(lengths) / median:,.0f} tokens/s ({median:.1f} s)")
    print(f"ratio {medians['transformers'] / medians['derta_jax']:.2f}")


def torch_answers(directory: Path) -> Callable:
    """Write the model and answer with it through transformers, in the order of the prompts' lengths."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, eos_token_id=2)).eval()
    model.save_pretrained(directory)

    def answer(prompts, stop_ids):
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        answers: list[list[int]] = [[]] * len(prompts)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            width = max(len(prompts[place]) for place in places)
            ids = torch.zeros((len(places), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                ids[row, width - len(prompts[place]) :] = torch.tensor(prompts[place])
                mask[row, width - len(prompts[place]) :] = 1
            with torch.inference_mode():
                made = model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                    eos_token_id=stop_ids,
                    pad_token_id=0,
                )
            for place, row in zip(places, made[:, width:].tolist(), strict=True):
                stop = next((at for at, token in enumerate(row) if token in set(stop_ids)), len(row))
                answers[place] = row[:stop]
        return answers

    return answer


def jax_answers(directory: Path) -> Callable:
    """The same through our own generation."""
    import jax

    from derta_jax.evaluation.generate import generate
    from derta_jax.interop.hf_load import load_pretrained
    from derta_jax.models.decoder import unrolled
    from derta_jax.training.mesh import single_device_mesh

    model, params = unrolled(*load_pretrained(directory))

    def answer(prompts, stop_ids):
        with jax.set_mesh(single_device_mesh()):
            return [answer.token_ids for answer in generate(model, params, prompts, NEW_TOKENS, stop_ids, BATCH)]

    return answer


if __name__ == "__main__":
    main()
