"""The same training in PyTorch, twice: as the authors of DeRTa do it, and as well as PyTorch can.

Source of the first: the authors' trainer as REFERENCE describes it: rows padded to the longest, all logits in float32,
labels made row by row, AdamW. The second computes no padding and no logit that is not learned: all rows end to end,
attention within each by PyTorch's own kernel, the head and its loss in chunks whose gradients are made at once, fused
AdamW, and the elementwise parts between products compiled where that works.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from derta_jax.benchmark.work import NO_LABEL, Work
from derta_jax.errors import UserError

CHUNK, CHUNK_ON_GPU = 512, 8192
"""Labelled tokens whose logits exist at a time. Each chunk adds to all of the head's gradient, which a GPU feels."""


class TorchModel(ABC):
    """A model in training. Parameters and moments are float32; products are in `train.dtype`."""

    def __init__(self, work: Work):
        self.work, self.train = work, work.bench.train
        self.accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self.device = torch.device("cuda" if self.accelerator else "cpu")
        self.dtype = getattr(torch, self.train.dtype)
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).to(self.device)
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.train.learning_rate,
            betas=(self.train.b1, self.train.b2),
            eps=self.train.eps,
            weight_decay=self.train.weight_decay,
            fused=True,
        )

    @abstractmethod
    def padded_tokens(self, number: int) -> int:
        """Places that a step computes, filled or not."""

    @abstractmethod
    def loss(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Mean of -log P(label) over (token ids, labels) of each row."""

    def step(self, number: int) -> float:
        """Train on the rows of a step; its mean loss."""
        rows = [(torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in self.work.examples(number)]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(rows)
        loss.backward()
        if self.train.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def product(self, sides: int) -> Callable[[], Any]:
        matrix = torch.randn(sides, sides, device=self.device, dtype=self.dtype)

        def run() -> None:
            (matrix @ matrix)[0, 0].item()

        return run

    def device_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


class Original(TorchModel):
    """The authors' way."""

    def padded_tokens(self, number: int) -> int:
        lengths = [len(ids) for ids, _ in self.work.examples(number)]
        return len(lengths) * max(lengths)

    def loss(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        length = max(len(ids) for ids, _ in rows)
        shape = len(rows), length
        token_ids, attended = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        targets = torch.full(shape, NO_LABEL)
        for place, (ids, labels) in enumerate(rows):
            token_ids[place, : len(ids)], attended[place, : len(ids)], targets[place, : len(ids)] = ids, 1, labels
        inputs = {"input_ids": token_ids.to(self.device), "attention_mask": attended.to(self.device)}
        logits = self.model(**inputs, use_cache=False).logits.float()
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten().to(self.device), ignore_index=NO_LABEL
        )


class Best(TorchModel):
    """PyTorch at its best."""

    def __init__(self, work: Work):
        super().__init__(work)
        config = work.config
        if config.experts or config.model_type not in ("llama", "mistral"):
            raise UserError(f"PyTorch's best is written for llama and mistral, not for {config.model_type}")
        self.config = config
        parts: list[Callable[..., Any]] = [_before_attention, _after_attention, _loss_and_slopes]
        if work.bench.compile_torch:
            parts = [torch.compile(part, dynamic=True) for part in parts]
        self.before, self.after, self.loss_and_slopes = parts

    def padded_tokens(self, number: int) -> int:
        return sum(len(ids) for ids, _ in self.work.examples(number))

    def loss(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        lengths = [len(ids) for ids, _ in rows]
        ids = torch.cat([ids for ids, _ in rows]).to(self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        # the first token of a row has no label, so that a shift by one never reaches across rows
        targets = torch.cat([labels for _, labels in rows]).to(self.device)[1:]
        decoder = self.model.model
        x = decoder.embed_tokens(ids).to(self.dtype)
        cos, sin = (part[0, :, None] for part in decoder.rotary_emb(x, positions[None]))
        for layer in decoder.layers:
            query, key, value = self.before(layer, x, cos, sin, self.config.head_dim)
            x = self.after(layer, x, self._attend(query, key, value, lengths))
        x = _rms_norm(x, decoder.norm)
        places = (targets != NO_LABEL).nonzero()[:, 0]
        chunk = CHUNK_ON_GPU if self.accelerator else CHUNK
        labelled = x[places], self.model.lm_head.weight, targets[places]
        with torch.autocast(self.device.type, enabled=False):
            return _ChunkedLoss.apply(*labelled, self.dtype, chunk, self.loss_and_slopes)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """[N, H, h] of all rows end to end; each row attends to itself."""
        if self.accelerator and self.dtype == torch.bfloat16:
            return self._attend_at_once(query, key, value, lengths)
        split = (part.split(lengths) for part in (query, key, value))
        rows = zip(*split, strict=True)
        return torch.cat([self._attend_in_row(*(part.transpose(0, 1)[None] for part in row)) for row in rows])

    def _attend_at_once(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """FlashAttention of all rows in one kernel, which wants 16 bits."""
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(self.device)
        window = -1 if self.config.sliding_window is None else self.config.sliding_window - 1
        query, key, value = (part.to(self.dtype) for part in (query, key, value))
        longest = max(lengths)
        return varlen_attn(
            query, key, value, ends, ends, longest, longest, window_size=(window, 0), enable_gqa=True
        ).flatten(1)

    def _attend_in_row(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length, window = query.shape[2], self.config.sliding_window
        mask = None
        if window is not None and length > window:
            distance = torch.arange(length)[:, None] - torch.arange(length)
            mask = ((distance >= 0) & (distance < window)).to(query.device)
        found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1)


def _before_attention(layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int) -> Any:
    """Norm, the three products, rope: [N, H, h] each."""
    attention, norm = layer.self_attn, layer.input_layernorm
    normed = _rms_norm(x, norm)
    query, key, value = (
        product(normed).unflatten(-1, (-1, head_dim))
        for product in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def _rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """Float32 inside, x's dtype outside."""
    return F.rms_norm(x.float(), norm.weight.shape, norm.weight, norm.variance_epsilon).to(x.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def _after_attention(layer: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The output product and the MLP, each added to the residual stream."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    x = x + layer.self_attn.o_proj(attended)
    normed = _rms_norm(x, norm)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _loss_and_slopes(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of -log P(target) from logits [M, V], and its gradient by them in their dtype."""
    wide = logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    at_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    slopes = (wide - log_sum).exp() - at_target.float()
    return (log_sum - wide.gather(-1, targets[:, None])).sum(), slopes.to(logits.dtype)


class _ChunkedLoss(torch.autograd.Function):
    """Makes the gradients while a chunk's logits are there, so that all of them never are."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, head: Any, targets: Any, dtype: Any, chunk: int, loss_and_slopes: Any) -> Any:
        narrow, by_hidden, by_head = head.to(dtype), torch.empty_like(hidden), torch.zeros_like(head)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            here = slice(start, start + chunk)
            piece = hidden[here].to(dtype)
            loss, slopes = loss_and_slopes(piece @ narrow.T, targets[here])
            total += loss
            by_hidden[here] = slopes @ narrow
            by_head += slopes.T @ piece
        ctx.save_for_backward(by_hidden, by_head)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        by_hidden, by_head = ctx.saved_tensors
        grad = grad / len(by_hidden)
        return by_hidden * grad, by_head * grad, None, None, None, None
