"""The `derta` command: parse, call one function, print."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from derta_jax import __version__
from derta_jax.config import load_config
from derta_jax.descriptions import (
    ANSWERS,
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
    SERVE,
    TRAIN,
)
from derta_jax.errors import RunFailed, StoppedEarly, UserError

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_STOPPED = 0, 1, 2, 75

EXIT_CODES_OF: dict[type[BaseException], int] = {
    UserError: EXIT_USER_ERROR,
    RunFailed: EXIT_FAILED,
    StoppedEarly: EXIT_STOPPED,
    KeyboardInterrupt: 128 + signal.SIGINT,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parse(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        args.run(args)
    except tuple(EXIT_CODES_OF) as error:
        # an empty one is Ctrl-C's
        print(f"derta {args.command}: {str(error) or 'interrupted'}", file=sys.stderr)
        if "derta_jax.training.pod.cluster" in sys.modules:
            sys.modules["derta_jax.training.pod.cluster"].leave(EXIT_CODES_OF[type(error)])
        return EXIT_CODES_OF[type(error)]
    except BrokenPipeError:
        # the reader of our pipe has seen enough (`derta inspect … | head`)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand behind options too, where argparse would not look for them."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
        args = parser.parse_args(argv)
    elif rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("derta", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"derta_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Any, help: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=description, formatter_class=formatter)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", _demo, "the whole method in small, in minutes", DEMO)
    demo.add_argument("--output", default="demo", metavar="DIR", help="where models and the report go (default: demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the world and the training (default: 0)")
    demo.add_argument("--seeds", type=int, metavar="N", help="so many worlds, each in DIR/seed-K, and their means")
    demo.add_argument(
        "--methods", default="vanilla,recaug,rto,derta", metavar="M,…", help="also dpo, derta_plus, security_vectors"
    )

    prepare = command("prepare", _prepare, "validate JSONL and write a dataset", PREPARE)
    prepare.add_argument("files", nargs="+", metavar="FILE.jsonl")
    prepare.add_argument("--output", required=True, metavar="DIR", help="the dataset, for `data.path`")
    prepare.add_argument("--dry-run", action="store_true", help="validate and count, write nothing")

    inspect = command("inspect", _inspect, "show rows as the model will see them", INSPECT)
    _add_config(inspect)
    inspect.add_argument("--rows", type=int, metavar="N", help="how many (default: 3, with --json all)")
    inspect.add_argument("--id", metavar="ID", help="only rows whose id starts so")
    inspect.add_argument("--json", action="store_true", help="one JSON object a row")

    train = command("train", _train, "train, or resume where the output directory left off", TRAIN)
    _add_config(train)
    train.add_argument("--dry-run", action="store_true", help="check everything, show the plan, do not train")
    train.add_argument(
        "--profile", type=int, nargs="?", default=0, const=3, metavar="N", help="trace N steps (default: 3) for XProf"
    )

    doctor = command("doctor", _doctor, "check machines, mesh and storage before training", DOCTOR)
    _add_config(doctor, optional=True)

    plan = command("plan", _plan, "will it fit, how fast, what does it cost, on a TPU slice", PLAN)
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

    generate = command("generate", _generate, "answer prompts from a file", GENERATE)
    generate.add_argument("model", metavar="MODEL", help=MODEL)
    generate.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="objects with `prompt` or `question`")
    generate.add_argument("--output", required=True, metavar="FILE.jsonl")
    generate.add_argument("--raw", action="store_true", help="no template: the model continues the text")
    _add_generation(generate)

    serve = command("serve", _serve, "an OpenAI-compatible server, for attackers and other tools", SERVE)
    serve.add_argument("model", metavar="MODEL", help=MODEL)
    serve.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: 127.0.0.1; others want a token")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    serve.add_argument("--token", metavar="TOKEN", help="that clients must bring; DERTA_TOKEN hides it from ps")
    serve.add_argument("--name", metavar="NAME", help="that clients ask for (default: the directory's, or MODEL)")
    serve.add_argument("--context", type=int, metavar="N", help="prompt and answer, in tokens (default: up to 4096)")
    serve.add_argument("--queue", type=int, default=128, metavar="N", help="requests that may wait (default: 128)")
    serve.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="to finish in (default: 30)")
    _add_placement(serve)

    evaluate = command("evaluate", _evaluate, "attack success, over-refusal and a report", EVALUATE)
    evaluate.add_argument("models", nargs="+", metavar="[NAME=]MODEL", help=MODEL)
    asked = evaluate.add_mutually_exclusive_group(required=True)
    asked.add_argument("--suite", metavar="FILE.yaml", help="what is asked, as configs/evaluation/paper.yaml")
    asked.add_argument("--harmful", metavar="FILE", help="or {prompt or question, harmful?} rows to attack with")
    evaluate.add_argument("--benign", metavar="FILE", help="beside --harmful: rows that deserve an answer")
    evaluate.add_argument("--prefill", type=int, nargs="*", default=[5, 10, 20], metavar="K", help="tokens given away")
    evaluate.add_argument("--judge", default="refusal-rule", metavar="NAME|FILE.yaml", help="default: refusal-rule")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="results.json, report.html, every answer")
    _add_generation(evaluate)

    judge = command("judge", _judge, "other verdicts for answers that are there: judges, labels", JUDGE)
    judge.add_argument("answers", nargs="+", metavar="ANSWERS.jsonl", help="as in `answers/` of `derta evaluate`")
    judge.add_argument("--judge", metavar="NAME|FILE.yaml", help="default: the verdicts in the files stand")
    judge.add_argument("--output", metavar="DIR|FILE.jsonl", help="the answers with their new verdicts")
    judge.add_argument("--labels", metavar="FILE.csv", help="a label sheet that people filled in")
    judge.add_argument("--label-sheet", metavar="FILE.csv", help="write one")
    judge.add_argument("--blind", action="store_true", help="a sheet in random order, without models and verdicts")
    judge.add_argument("--per-attack", type=int, metavar="N", help="only N answers of each attack of each model")
    judge.add_argument("--seed", type=int, default=0, help="of the sheet's order and choice (default: 0)")

    answers = command("answers", _answers, "an evaluation's answers as files of other tools", ANSWERS)
    answers.add_argument("answers", metavar="ANSWERS.jsonl", help="as in `answers/` of `derta evaluate`")
    answers.add_argument("--set", required=True, metavar="NAME", help="which attack, task or set of prompts")
    answers.add_argument("--for", required=True, dest="tool", choices=("alpaca", "harmbench", "easyjailbreak"))
    answers.add_argument("--output", required=True, metavar="FILE")

    export = command("export", _export, "a run's checkpoint as a Hugging Face directory or PEFT adapter", EXPORT)
    export.add_argument("model", metavar="MODEL", help="the run directory (`train.output`), or an adapter to merge")
    export.add_argument("directory", metavar="DIR", help="where the Hugging Face model goes")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    export.add_argument("--merged", action="store_true", help="of a LoRA run, the whole model instead of the adapter")
    export.add_argument("--base", metavar="NAME", help="what an adapter says it goes on (default: its `model.path`)")
    _add_weights(export)

    convert = command("convert", _convert, "between a Hugging Face model and a checkpoint", CONVERT)
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


def _console(quiet: bool = False) -> Any:
    from rich.console import Console

    return Console(quiet=quiet)


def _demo(args: argparse.Namespace) -> None:
    from derta_jax.miniature.experiment import run_demo
    from derta_jax.miniature.methods import parse_methods
    from derta_jax.miniature.seeds import run_seeds

    methods = parse_methods(args.methods)
    if args.seeds is None:
        run_demo(args.output, args.seed, _console(), methods)
    else:
        run_seeds(args.output, args.seeds, _console(), methods)


def _prepare(args: argparse.Namespace) -> None:
    from derta_jax.data.dataset import Dataset, prepare, validate

    dataset: Dataset = validate(args.files) if args.dry_run else prepare(args.files, args.output)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in dataset.counts.items())
    place = "nothing written (--dry-run)" if args.dry_run else args.output
    print(f"{len(dataset.examples):,} examples ({counts}), hash {dataset.content_hash}: {place}")


def _inspect(args: argparse.Namespace) -> None:
    from derta_jax.data.dataset import load_dataset
    from derta_jax.data.inspect import counts_table, inspect_row, legend, render_row
    from derta_jax.data.pipeline import training_rows
    from derta_jax.interop.tokenizer import load_tokenizer, refusal_token_id
    from derta_jax.objectives.objective import of_config
    from derta_jax.training.restore import find_files

    config = load_config(args.config, args.overrides)
    dataset = load_dataset(config.data.path)
    tokenizer = load_tokenizer(find_files(config.model.path))
    refusal_id = refusal_token_id(tokenizer, config.objective.refusal_token)
    objective = of_config(config)
    data = training_rows(dataset, config, objective, tokenizer)
    rows = [row for row in data.rows if args.id is None or row.id.startswith(args.id)]
    if not data.rows:
        raise UserError("no row has a labelled token left: raise train.sequence_length")
    if not rows:
        raise UserError(f"no row has an id that starts with {args.id!r}")
    inspected = (inspect_row(row, tokenizer, objective, refusal_id, config.train.seed) for row in rows)
    if args.json:
        for row in list(inspected)[: args.rows]:
            print(json.dumps(row, ensure_ascii=False))
        return
    console = _console()
    everything = list(inspected)
    for row in everything[: 3 if args.rows is None else args.rows]:
        console.print(render_row(row, config.objective.refusal_token), soft_wrap=True)
        console.print()
    console.print(legend(config.objective.refusal_token))
    console.print(counts_table(everything))
    if data.unlabelled:
        console.print(f"{len(data.unlabelled):,} rows have no label left after cutting and are not trained on")


def _train(args: argparse.Namespace) -> None:
    from derta_jax.training.loop import train
    from derta_jax.training.pod import processes
    from derta_jax.training.pod.cluster import joined
    from derta_jax.training.watching.goodput import process_started

    config = load_config(args.config, args.overrides)
    with joined(config.processes):
        train(config, _console(quiet=processes.index() > 0), args.dry_run, args.profile, process_started())


def _doctor(args: argparse.Namespace) -> None:
    from derta_jax.config import Processes
    from derta_jax.training.pod import processes
    from derta_jax.training.pod.cluster import joined
    from derta_jax.training.pod.doctor import doctor

    config = load_config(args.config, args.overrides) if args.config else None
    with joined(config.processes if config else Processes()):
        doctor(config, _console(quiet=processes.index() > 0))


def _plan(args: argparse.Namespace) -> None:
    from derta_jax.planning import command
    from derta_jax.planning.slices import find_slices

    os.environ["JAX_PLATFORMS"] = "cpu"  # the devices planned for are elsewhere
    config = load_config(args.config, args.overrides)
    if bool(args.slice) == args.all_slices:
        raise UserError("say where: --slice v5e-16 (or more of them, with commas), or --all-slices")
    places = command.all_slices(config) if args.all_slices else find_slices(args.slice)
    console, name = _console(quiet=args.json), command.config_name(args.config, args.overrides)
    if args.generate:
        plans = command.plan_answers(name, config, places, args.generate, console, args.price)
    else:
        plans = command.plan_slices(name, config, places, console, args.search, args.price)
    if args.json:
        print(command.as_json(plans))
    else:
        (command.show_answers if args.generate else command.show_plans)(plans, console)


def _generate(args: argparse.Namespace) -> None:
    from derta_jax.evaluation.commands import generate_file

    generate_file(args.model, args.prompts, args.output, _generation(args), args.raw, _console())


def _serve(args: argparse.Namespace) -> None:
    from derta_jax.evaluation.serving.command import serve
    from derta_jax.evaluation.serving.settings import Serving
    from derta_jax.evaluation.subject import Generation, parse_mesh

    token = os.environ.get("DERTA_TOKEN") or None if args.token is None else args.token
    serving = Serving(args.host, args.port, token, args.name, args.context, args.queue, args.grace)
    mesh = parse_mesh(args.mesh) if args.mesh else None
    # how long and how warm an answer is, each request says
    serve(args.model, Generation(1, args.batch_size, args.template, args.dtype, mesh=mesh), serving, _console())


def _evaluate(args: argparse.Namespace) -> None:
    from derta_jax.evaluation.commands import evaluate_models, plan_of_files, plan_of_suite

    plan = plan_of_suite(args.suite) if args.suite else plan_of_files(args.harmful, args.benign, args.prefill)
    evaluate_models(args.models, plan, args.judge, args.output, _generation(args), _console())


def _judge(args: argparse.Namespace) -> None:
    from derta_jax.evaluation.judging.command import judge_answers
    from derta_jax.evaluation.judging.label_sheet import Sheet
    from derta_jax.evaluation.judging.local_model import speaker
    from derta_jax.evaluation.subject import Generation

    sheet = Sheet(args.blind, args.per_attack, args.seed)
    console = _console()
    answer = speaker(args.judge, Generation(1, 32, None, "bfloat16"), console) if args.judge else None
    judge_answers(args.answers, args.judge, args.output, args.label_sheet, args.labels, sheet, console, answer)


def _answers(args: argparse.Namespace) -> None:
    from derta_jax.evaluation.exchange import hand_over

    count = hand_over(args.answers, args.set, args.tool, args.output)
    print(f"{count:,} answers: {args.output}")


def _generation(args: argparse.Namespace) -> Any:
    from derta_jax.evaluation.subject import Generation, parse_mesh

    mesh = parse_mesh(args.mesh) if args.mesh else None
    return Generation(
        args.max_new_tokens, args.batch_size, args.template, args.dtype, args.temperature, args.seed, mesh
    )


def _export(args: argparse.Namespace) -> None:
    from derta_jax.training.export import export_model

    export_model(
        args.model, args.directory, _console(), args.step, args.dtype, args.max_shard_size, args.merged, args.base
    )


def _convert(args: argparse.Namespace) -> None:
    from derta_jax.training.export import convert

    convert(args.model, args.directory, _console(), args.dtype, args.max_shard_size)


if __name__ == "__main__":
    sys.exit(main())
