"""What trees save of a step's time, by the share of safety rows, for the model of `configs/bench_cpu.yaml`.

    python -m tests.endurance.tree_saving --repeats 5

Rows are of random tokens. Helpful ones have 100 to 600 tokens of answer; a triple has a safe answer r and a harmful one
r̂ of 60 to 200 each, and gives DeRTa's two rows: q, the first k tokens of r̂, r; and q, r̂. A step without trees and one
with them take turns. With trees a step takes as many rows on average, but others, so that seconds are of a row.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from derta_jax.benchmark.config import Synthetic, load_bench
from derta_jax.benchmark.ours import Ours
from derta_jax.benchmark.work import Work, write_model
from derta_jax.data.tokenise import Region, TokenRow

CONFIG = Path(__file__).parents[2] / "configs" / "bench_cpu.yaml"
SHARES = (0.1, 0.5, 1.0)


def make_rows(synthetic: Synthetic, share: float) -> list[TokenRow]:
    """DeRTa's rows of random tokens, `share` of them safety rows."""
    rng = np.random.default_rng(0)

    def tokens(lengths: tuple[int, int]) -> np.ndarray:
        return rng.integers(2, synthetic.model.vocab_size, rng.integers(*lengths, endpoint=True), dtype=np.int32)

    def row(name: str, stream: str, *parts: tuple[Region, np.ndarray]) -> TokenRow:
        ids = np.concatenate([part for _, part in parts])
        regions = np.concatenate([np.full(len(part), region, np.uint8) for region, part in parts])
        return TokenRow(name, "derta", ids, regions, stream, None, False)

    rows: list[TokenRow] = []
    while len(rows) < synthetic.rows:
        number, q = len(rows), tokens(synthetic.prompt_tokens)
        # a triple gives two rows, so that it is drawn half as often
        if rng.random() >= share / (2 - share):
            answer = (Region.RESPONSE, tokens(synthetic.helpful_tokens))
            rows.append(row(f"{number}", "mle", (Region.PROMPT, q), answer))
            continue
        safe, harmful = tokens(synthetic.safety_tokens), tokens(synthetic.safety_tokens)
        prefix = harmful[: rng.integers(0, len(harmful), endpoint=True)]
        parts = (Region.PROMPT, q), (Region.HARMFUL_PREFIX, prefix), (Region.RESPONSE, safe)
        rows.append(row(f"{number}#prefix", "mle", *parts))
        rows.append(row(f"{number}#rto", "rto", (Region.PROMPT, q), (Region.RESPONSE, harmful)))
    return rows


def main() -> None:
    """Print tokens and seconds that are saved, for each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("overrides", nargs="*", help="of the config, as train.batch_size=32")
    args = parser.parse_args()
    bench = load_bench(CONFIG, [f"repeats={args.repeats}", "contenders=[padded,packed]", *args.overrides])
    synthetic = bench.synthetic
    assert synthetic is not None
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_model(synthetic, model, bench.train.seed)
        for share in SHARES:
            work = Work(bench, model, make_rows(synthetic, share), refusal_id=1)
            print(measured(share, work), flush=True)


def measured(share: float, work: Work) -> str:
    """Steps of both kinds in turn; medians of seconds a row."""
    kinds = {packing: Ours(work, packing) for packing in ("rows", "tree")}
    seconds: dict[str, list[float]] = {packing: [] for packing in kinds}
    for number in range(work.bench.steps):
        for packing, ours in kinds.items():
            started = time.perf_counter()
            ours.step(number)
            seconds[packing].append((time.perf_counter() - started) / len(ours.batches.row_ids(number)))
    warm = work.bench.steps - work.bench.repeats
    alone, trees = (statistics.median(seconds[packing][warm:]) for packing in kinds)
    tokens = 1 - kinds["tree"].batches.lengths.sum() / kinds["rows"].batches.lengths.sum()
    placed = [kinds[packing].padded_tokens(0) / work.bench.train.batch_size for packing in kinds]
    return (
        f"{share:4.0%} safety rows: {tokens:5.1%} of the tokens saved, {1 - placed[1] / placed[0]:5.1%} of the places; "
        f"{alone:.3f} → {trees:.3f} s a row, {1 - trees / alone:5.1%} of the time"
    )


if __name__ == "__main__":
    main()
