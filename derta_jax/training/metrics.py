"""A run's figures: one JSON object a step in `metrics.jsonl`, the same scalars in TensorBoard, a line for people."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]


def step_record(
    step: int, sums: Mapping[str, Any], batch: Mapping[str, np.ndarray], learning_rate: float, seconds: float
) -> Record:
    """The figures of one step, DESIGN's names. Losses are means in nats a token, None where a kind has no token.
    `loss_aux` is a mixture's load-balancing loss before its weight: the experts of a token, when the load is even.

    `tokens` counts all positions that were computed, `useful_tokens` those that are not padding.
    """
    values = {name: float(value) for name, value in sums.items()}

    def mean(kind: str) -> float | None:
        return values[f"{kind}_sum"] / values[f"{kind}_tokens"] if values.get(f"{kind}_tokens") else None

    return {
        "step": step,
        "loss": values["loss_sum"] / values["weight_sum"],
        "loss_mle": mean("mle"),
        "loss_rto": mean("rto"),
        **({"loss_aux": mean("aux")} if "aux_sum" in values else {}),
        "grad_norm": values["grad_norm"],
        "lr": learning_rate,
        "tokens": int(batch["token_ids"].size),
        "useful_tokens": int((batch["segment_ids"] > 0).sum()),
        "labelled_tokens": int(batch["keep"].sum()),
        "seconds": seconds,
    }


def format_record(record: Record, steps: int, eta_seconds: float | None) -> str:
    """One dense line: `step 12/1032 eta 1:02:03 loss 1.234 (mle 1.100, rto 2.345) …`."""
    losses = {kind: record.get(f"loss_{kind}") for kind in ("mle", "rto", "aux")}
    parts = [f"{kind} {value:.4f}" for kind, value in losses.items() if value is not None]
    eta = "-" if eta_seconds is None else format_seconds(eta_seconds)
    rate = {name: record[name] / record["seconds"] for name in ("tokens", "useful_tokens", "labelled_tokens")}
    return (
        f"step {record['step']:>{len(str(steps))}}/{steps}  eta {eta}  "
        f"loss {record['loss']:.4f} ({', '.join(parts)})  grad {record['grad_norm']:.3g}  lr {record['lr']:.2e}  "
        f"{record['seconds'] * 1000:,.0f} ms  tokens/s {rate['useful_tokens']:,.0f} useful, "
        f"{rate['tokens']:,.0f} padded, {rate['labelled_tokens']:,.0f} labelled"
    )


def format_seconds(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` of a run directory; what lies after `resumed_step` is dropped."""

    def __init__(self, output: Path, resumed_step: int):
        from tensorboardX import SummaryWriter  # imports torch where there is one: seconds

        file = output / "metrics.jsonl"
        _keep_until(file, resumed_step)
        self._file = file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(output / "tensorboard"), purge_step=resumed_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, record["step"])


def _keep_until(file: Path, step: int) -> None:
    """Steps done after the checkpoint we resume from will be done again; a line cut off by a kill is dropped too."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    partial = file.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, file)
