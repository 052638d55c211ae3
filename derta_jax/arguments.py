"""The `derta` command's arguments."""

import argparse
from collections.abc import Callable, Mapping

from derta_jax.data.public_sets import NAMES
from derta_jax.descriptions import (
    ANSWERS,
    BENCH,
    CONVERT,
    DEMO,
    DESCRIPTION,
    DOCTOR,
    EVALUATE,
    EXIT_CODES,
    EXPORT,
    GENERATE,
    INSPECT,
    JUDGE,
    MODEL,
    PLAN,
    PREPARE,
    PROTECT,
    SERVE,
    TRAIN,
)

Run = Callable[[argparse.Namespace], None]


def make_parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """`args.run` is the command's of `runs`, by its name."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("derta", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=formatter)
    parser.add_argument("--version", action="store_true", help="print the version; with --verbose all of a bug report")
    parser.add_argument("--verbose", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=description, formatter_class=formatter)
        sub.set_defaults(run=runs[name])
        return sub

    demo = command("demo", "the whole method in small, in minutes", DEMO)
    demo.add_argument("--output", default="demo", metavar="DIR", help="where models and the report go (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the world and the training (default: 0)")
    demo.add_argument("--seeds", type=int, metavar="N", help="so many worlds, each in DIR/seed-K, and their means")
    demo.add_argument(
        "--methods", default="vanilla,recaug,rto,derta", metavar="M,…", help="also dpo, derta_plus, security_vectors"
    )

    prepare = command("prepare", "validate JSONL and write a dataset", PREPARE)
    prepare.add_argument("files", nargs="+", metavar="FILE")
    prepare.add_argument("--from", dest="source", choices=NAMES, help="FILEs are of this public set")
    prepare.add_argument("--with", dest="more", nargs="+", default=[], metavar="FILE.jsonl", help="and these are ours")
    prepare.add_argument("--limit", type=int, metavar="N", help="so many triples of the public set")
    prepare.add_argument(
        "--refuse", nargs="+", default=[], metavar="LIST", help="prompts, or hashes of them, that must not be there"
    )
    prepare.add_argument("--leave-out", nargs="+", default=[], metavar="LIST", help="the same, left out instead")
    prepare.add_argument("--output", required=True, metavar="DIR", help="the dataset, for `data.path`")
    prepare.add_argument("--dry-run", action="store_true", help="validate and count, write nothing")

    inspect = command("inspect", "show rows as the model will see them", INSPECT)
    _add_config(inspect)
    inspect.add_argument("--rows", type=int, metavar="N", help="how many (default: 3, with --json all)")
    inspect.add_argument("--id", metavar="ID", help="only rows whose id starts so")
    inspect.add_argument("--json", action="store_true", help="one JSON object a row")
    inspect.add_argument("--svg", metavar="FILE", help="the rows shown as a picture, too")

    train = command("train", "train, or resume where the output directory left off", TRAIN)
    _add_config(train)
    train.add_argument("--dry-run", action="store_true", help="check everything, show the plan, do not train")
    train.add_argument(
        "--profile", type=int, nargs="?", default=0, const=3, metavar="N", help="trace N steps (default: 3) for XProf"
    )

    protect = command("protect", "fine-tune on untrusted data, beneath security vectors", PROTECT)
    _add_config(protect)
    protect.add_argument("--dry-run", action="store_true", help="check both runs, show the first, do not train")

    doctor = command("doctor", "check machines, mesh and storage before training", DOCTOR)
    _add_config(doctor, optional=True)

    plan = command("plan", "will it fit, how fast, what does it cost, on a TPU slice", PLAN)
    _add_config(plan)
    plan.add_argument("--slice", metavar="NAME[,NAME…]", help="as v5e-16, v5p-128, or 2xv5e-64 for two of them")
    plan.add_argument("--all-slices", action="store_true", help="every slice on which a chip gets at least one row")
    plan.add_argument("--search", action="store_true", help="try meshes, accumulation and remat; the fastest first")
    plan.add_argument(
        "--generate",
        metavar="ROWSxPROMPTxNEW",
        nargs="?",
        const="32x512x256",
        help="what answering takes, not training: rows at a time, tokens of a prompt and of an answer",
    )
    plan.add_argument("--price", type=float, metavar="DOLLARS", help="of a chip an hour (default: the list price)")
    plan.add_argument("--json", action="store_true", help="a list with one object a plan")

    bench = command("bench", "a train step in JAX against PyTorch, on this machine", BENCH)
    _add_config(bench)
    bench.add_argument(
        "--output", metavar="DIR", help="bench.json, bench.md, bench.svg; of a sweep sweep.json, sweep.svg"
    )
    bench.add_argument("--json", action="store_true", help="the results as one object")

    generate = command("generate", "answer prompts from a file", GENERATE)
    generate.add_argument("model", metavar="MODEL", help=MODEL)
    generate.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="objects with `prompt` or `question`")
    generate.add_argument("--output", required=True, metavar="FILE.jsonl")
    generate.add_argument("--raw", action="store_true", help="no template: the model continues the text")
    _add_generation(generate)

    serve = command("serve", "an OpenAI-compatible server, for attackers and other tools", SERVE)
    serve.add_argument("model", metavar="MODEL", help=MODEL)
    serve.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1; others want a token")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    serve.add_argument("--token", metavar="TOKEN", help="that clients must bring; DERTA_TOKEN hides it from ps")
    serve.add_argument("--name", metavar="NAME", help="that clients ask for (default: the directory's, or MODEL)")
    serve.add_argument("--context", type=int, metavar="N", help="prompt and answer, in tokens (default: up to 4096)")
    serve.add_argument("--queue", type=int, default=128, metavar="N", help="requests that may wait (default: 128)")
    serve.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="to finish in (default: 30)")
    _add_placement(serve)

    evaluate = command("evaluate", "attack success, over-refusal and a report", EVALUATE)
    evaluate.add_argument("models", nargs="+", metavar="[NAME=]MODEL", help=MODEL)
    asked = evaluate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--suite", metavar="FILE.yaml", help="what is asked, as configs/evaluation/paper.yaml")
    asked.add_argument("--harmful", metavar="FILE", help="or {prompt or question, harmful?} rows to attack with")
    evaluate.add_argument("--benign", metavar="FILE", help="beside --harmful: rows that deserve an answer")
    evaluate.add_argument("--prefill", type=int, nargs="*", default=[5, 10, 20], metavar="K", help="tokens given away")
    evaluate.add_argument("--judge", default="refusal-rule", metavar="NAME|FILE.yaml", help="default: refusal-rule")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="results.json, report.html, every answer")
    _add_generation(evaluate)

    judge = command("judge", "other verdicts for answers that are there: judges, labels", JUDGE)
    judge.add_argument("answers", nargs="+", metavar="ANSWERS.jsonl", help="as in `answers/` of `derta evaluate`")
    judge.add_argument("--judge", metavar="NAME|FILE.yaml", help="default: the verdicts in the files stand")
    judge.add_argument("--output", metavar="DIR|FILE.jsonl", help="the answers with their new verdicts")
    judge.add_argument("--labels", metavar="FILE.csv", help="a label sheet that people filled in")
    judge.add_argument("--label-sheet", metavar="FILE.csv", help="write one")
    judge.add_argument("--blind", action="store_true", help="a sheet in random order, without models and verdicts")
    judge.add_argument("--per-attack", type=int, metavar="N", help="only N answers of each attack of each model")
    judge.add_argument("--seed", type=int, default=0, help="of the sheet's order and choice (default: 0)")

    answers = command("answers", "an evaluation's answers as files of other tools", ANSWERS)
    answers.add_argument("answers", metavar="ANSWERS.jsonl", help="as in `answers/` of `derta evaluate`")
    answers.add_argument("--set", required=True, metavar="NAME", help="which attack, task or set of prompts")
    answers.add_argument("--for", required=True, dest="tool", choices=("alpaca", "harmbench", "easyjailbreak"))
    answers.add_argument("--output", required=True, metavar="FILE")

    export = command("export", "a run's checkpoint as a Hugging Face directory or PEFT adapter", EXPORT)
    export.add_argument("model", metavar="MODEL", help="the run directory (`train.output`), or an adapter to merge")
    export.add_argument("directory", metavar="DIR", help="where the Hugging Face model goes")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    export.add_argument("--merged", action="store_true", help="of a LoRA run, the whole model instead of the adapter")
    export.add_argument("--base", metavar="NAME", help="what an adapter says it goes on (default: its `model.path`)")
    _add_weights(export)

    convert = command("convert", "between a Hugging Face model and a checkpoint", CONVERT)
    convert.add_argument("model", metavar="MODEL", help="a Hugging Face directory, hub id or URL, or a checkpoint")
    convert.add_argument("directory", metavar="DIR", help="where the other form goes")
    _add_weights(convert)
    return parser


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: that of the original's config.json")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file (default: 5GB)")


def _add_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", nargs="?" if optional else None)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=50 data.recipe=vanilla")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    _add_placement(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) decodes greedily")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")


def _add_placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at a time (default: 32)")
    parser.add_argument("--template", metavar="TEXT", help="with {prompt}, or `chat`; default: the one trained with")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        help="as fsdp=4,tensor=8; default: tensor as far as it goes, data for the rest",
    )
