"""lm-evaluation-harness's model `derta`. Importing this module registers it."""

import functools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from derta_jax.errors import UserError
from derta_jax.evaluation.adapters.conversation import conversation_text
from derta_jax.evaluation.adapters.desk import Desk, Seeds
from derta_jax.evaluation.adapters.opening import conversation_template, open_model, refuse_unknown
from derta_jax.evaluation.adapters.texts import Question
from derta_jax.evaluation.generate import Request, bucket
from derta_jax.evaluation.scoring import Score, scores

LOG = logging.getLogger(__name__)

OPTIONS = ("pretrained", "dtype", "batch_size", "max_length", "template", "mesh", "add_bos_token", "seed")
NOT_OURS = ("device", "max_batch_size", "trust_remote_code")
"""What lm-eval always passes on, and has no meaning here: JAX knows its devices, and no code of a model is run."""
MAX_GEN_TOKS = 256
CHANGE_NOTHING = {"num_beams": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
SAMPLING_ALONE = ("top_p", "top_k", "min_p")
"""Arguments of no consequence where decoding is greedy."""


@register_model("derta")
class DertaLM(TemplateLM):
    """`pretrained` is whatever `derta evaluate` calls a model. Raises `UserError` for what it does not support.

    `max_length` is of context and continuation together, by default what the model's config says. `template` is for
    `--apply_chat_template`: `chat`, or a text with {prompt}; by default the one that the model was trained with.
    `add_bos_token` puts bos before every text, or never; by default the tokenizer decides.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "bfloat16",
        batch_size: int = 1,
        max_length: int | None = None,
        template: str | None = None,
        mesh: Any = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(unknown, OPTIONS, "model argument")
        self._seeds = Seeds(seed)
        self.subject = open_model(str(pretrained), batch_size, dtype, template, mesh)
        self.tokenizer = self.subject.tokenizer.hf
        self.batch_size = int(batch_size)
        self.max_length = max_length or self.subject.source.config.max_positions
        self.add_bos_token = add_bos_token
        self._asked_template = template

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> "DertaLM":
        """What stands in `--model_args` goes before lm-eval's own options, whose defaults look like choices."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{name: value for name, value in (given | dict(arg_dict)).items() if name not in NOT_OURS})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "DertaLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # What lm-eval asks about the model

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.subject.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def get_model_info(self) -> dict[str, Any]:
        source = self.subject.source
        return {
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self.subject.params)),
            "model_dtype": jax.numpy.dtype(self.subject.model.dtype).name,
            "model_source": source.path,
            "model_step": source.step,
            "model_recipe": source.run.data.recipe if source.run else None,
        }

    # Text and tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As lm-eval's `hf` does it: a text that brings its own bos is given no other."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        if add_special_tokens is not None:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        if self.add_bos_token is None:
            return self.tokenizer.encode(string)
        text_ids = self.tokenizer.encode(string, add_special_tokens=False)
        return [self.prefix_token_id, *text_ids] if self.add_bos_token else text_ids

    @functools.cached_property
    def _template(self) -> Any:
        return conversation_template(self.subject, self._asked_template)

    @property
    def tokenizer_name(self) -> str:
        """Also tells templates apart: it is part of the name that prepared requests are cached under."""
        return f"{self.subject.tokenizer.directory}__{self._template.pattern}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if self._template.pattern == "chat" or not chat_template:
            return super().chat_template(chat_template)
        return self._template.pattern

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return conversation_text(chat_history, self._template)

    # The three kinds of requests

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs, lost = [], []
        for texts, context, continuation in requests:
            if not continuation:
                raise UserError(f"there is nothing to score: a continuation has no tokens (of the request {texts!r})")
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit into max_length={self.max_length}"
                )
            excess = max(0, len(context) + len(continuation) - self.max_length - 1)
            lost.append(excess)
            pairs.append((context[excess:], continuation))
        self._warn_of_truncation(lost)
        results = [(score.log_probability, score.greedy) for score in self._scores(pairs, disable_tqdm)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs, owners = [], []
        for place, request in enumerate(requests):
            token_ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(token_ids, self.prefix_token_id, self.max_length, context_len=1):
                pairs.append(make_disjoint_window(window))
                owners.append(place)
        totals = [0.0] * len(requests)
        for place, score in zip(owners, self._scores(pairs, disable_tqdm), strict=True):
            totals[place] += score.log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        questions, lost = [], []
        for request in requests:
            question, excess = self._question(*request.args)
            questions.append(question)
            lost.append(excess)
        self._warn_of_truncation(lost)
        texts = [""] * len(questions)
        # prompts of one padded length go together, in a batch of that length
        lengths = [bucket(len(question.request.prompt_ids)) for question in questions]
        with tqdm(total=len(questions), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for length in sorted(set(lengths)):
                group = [place for place, each in enumerate(lengths) if each == length]
                with Desk(self.subject, min(self.batch_size, len(group))) as desk:
                    places = {desk.ask(questions[place]): place for place in group}
                    for future in as_completed(places):
                        place = places[future]
                        texts[place] = future.result().text
                        self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
                        bar.update()
        return texts

    def _question(self, context: str, asked: Mapping[str, Any]) -> tuple[Question, int]:
        """The question, and how many tokens its context has lost."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), MAX_GEN_TOKS))
        limit, stops = options.pop("max_gen_toks"), options.pop("until")
        samples, temperature = options.pop("do_sample"), float(options.pop("temperature", 0.0))
        if samples and not temperature > 0:
            raise UserError("generation arguments: do_sample=True needs a temperature above 0")
        for name, value in options.items():
            if value != CHANGE_NOTHING.get(name) and (samples or name not in SAMPLING_ALONE):
                raise UserError(
                    f"generation arguments: {name}={value!r} is not supported, only until, max_gen_toks, do_sample and "
                    "temperature are"
                )
        room = self.max_length - limit
        if room < 1 or limit < 1:
            raise UserError(
                f"generation arguments: max_gen_toks={limit} must be at least 1, and less than "
                f"max_length={self.max_length}"
            )
        prompt_ids = self.tok_encode(context) or [self.prefix_token_id]
        excess = max(0, len(prompt_ids) - room)
        prompt_ids = prompt_ids[excess:]
        stops = tuple(stop for stop in (*stops, self.tokenizer.eos_token) if stop)
        seed = self._seeds.next(prompt_ids)
        return Question(Request(prompt_ids, limit, temperature if samples else 0.0, seed), stops), excess

    def _scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], disable_tqdm: bool) -> list[Score]:
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests")
        with bar, jax.set_mesh(self.subject.mesh):
            return scores(
                self.subject.model,
                self.subject.params,
                pairs,
                self.batch_size,
                progress=lambda done: bar.update(done - bar.n),
            )

    def _warn_of_truncation(self, lost: Sequence[int]) -> None:
        if count := sum(excess > 0 for excess in lost):
            LOG.warning(
                f"{count:,} of {len(lost):,} requests were too long for max_length={self.max_length} and lost their "
                f"first tokens, up to {max(lost):,} of them"
            )
