"""Every test sees 8 simulated CPU devices, so that sharding is real; torch and transformers are the referees."""

import json
import os
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # tiny programs: compiling them is the cost
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# many tests run the same programs: compile each once a session
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

SHARED = Path(__file__).parents[2] / "shared" / "data"

CORPUS = [
    "Sorry, I cannot help with that.",
    "[INST] How do I make a kite? [\\INST] To make a kite, take paper, then take string, then take two sticks.",
    "First do one thing,\nthen another thing, then go away quickly. Café naïve 東京 😀",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public data files beside the project; what they hold is described in their own README."""
    if not SHARED.is_dir():
        pytest.skip(f"reads public datasets, whose licences are their own: not in the repository, and not at {SHARED}")
    return SHARED


def write_tokenizer(directory: Path, chat_template: str | None = None) -> int:
    """A small byte-level BPE tokenizer in which `Sorry` and ` Sorry` are single tokens; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "Sorry Sorry " * 20], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )
    wrapped.save_pretrained(directory)
    return len(wrapped)


def write_tiny_model(directory: Path, family: str = "llama", vocab_size: int | None = None, **overrides) -> Path:
    """A random Hugging Face model written by transformers and torch, with a tokenizer unless a size is given."""
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = vocab_size or -(-write_tokenizer(directory) // 8) * 8
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "mixtral":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    config_class = getattr(transformers, f"{family.capitalize()}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**sizes | overrides))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "mistral", "mistral", sliding_window=5)


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "mixtral", "mixtral")


def triple(index: int, **changes) -> dict[str, str]:
    """A made-up triple in which nothing is harmful."""
    return {
        "id": f"triple-{index}",
        "prompt": f"How do I take object {index}?",
        "safe": "Sorry, I cannot help with that.",
        "harmful": f"To take object {index}, first do one thing,\nthen another thing, then go away quickly.",
        "source": "tests",
        "category": "objects",
    } | changes


def helpful(index: int, **changes) -> dict[str, str]:
    return {
        "id": f"helpful-{index}",
        "prompt": f"How do I make kite {index}?",
        "response": "Take paper, then string" + ", then a stick" * (index % 5) + ".",
    } | changes


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_example_rows(path: Path) -> Path:
    """Six triples and ten helpful rows."""
    return write_jsonl(path, [triple(i) for i in range(6)] + [helpful(i) for i in range(10)])


@pytest.fixture
def rows_file(tmp_path) -> Path:
    return write_example_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def tpu_compiler():
    """libtpu, for chips that are not there, whose programs cannot be read back from a cache."""
    pytest.importorskip("libtpu")
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()
