"""The untrained model of the miniature world, as a Hugging Face directory like any other."""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from derta_jax.interop.hf_export import export_pretrained
from derta_jax.miniature.world import World
from derta_jax.models.config import ModelConfig
from derta_jax.models.decoder import Decoder

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def write_start_model(world: World, directory: Path, seed: int) -> None:
    """Random weights, config and a word-level tokenizer of the world's vocabulary."""
    words = [*SPECIAL_TOKENS.values(), *world.vocabulary]
    config = ModelConfig(
        model_type="llama",
        vocab_size=len(words),
        embed_dim=64,
        ffn_dim=176,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        max_positions=64,
    )
    model = Decoder(config)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    with tempfile.TemporaryDirectory() as files:
        _write_tokenizer(words, Path(files))
        (Path(files) / "config.json").write_text(json.dumps(config.to_hf()))
        export_pretrained(model, params, directory, source=files)


def _write_tokenizer(words: list[str], directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
    wrapped.save_pretrained(directory)
