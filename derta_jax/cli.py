"""The `derta` command: parse, call one function, print."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from derta_jax.arguments import Run, make_parser
from derta_jax.config import load_config
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
    parser = make_parser(COMMANDS)
    args, rest = parser.parse_known_args(argv)
    if not hasattr(args, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
        args = parser.parse_args(argv)
    elif rest:
        args.overrides = [*args.overrides, *rest]
    if args.version:
        args.run, args.command = _version, "--version"
    elif args.command is None:
        parser.error("the following arguments are required: COMMAND")
    return args


def _version(args: argparse.Namespace) -> None:
    from derta_jax import versions

    print(versions.bug_report() if args.verbose else f"derta_jax {versions.__version__}")


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
    from derta_jax.data import dataset
    from derta_jax.data.gather import gather

    made, left_out = gather(
        args.files, args.more, source=args.source, limit=args.limit, refuse=args.refuse, leave_out=args.leave_out
    )
    if not args.dry_run:
        dataset.write(made, args.output, [*args.files, *args.more])
    for reason, count in left_out.items():
        print(f"left out: {count:,} × {reason}")
    counts = ", ".join(f"{count:,} {kind}" for kind, count in made.counts.items())
    place = "nothing written (--dry-run)" if args.dry_run else args.output
    print(f"{len(made.examples):,} examples ({counts}), hash {made.content_hash}: {place}")


def _inspect(args: argparse.Namespace) -> None:
    from derta_jax.data.dataset import load_dataset
    from derta_jax.data.inspect import counts_table, inspect_row, legend, render_row, save_picture
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
    shown = everything[: 3 if args.rows is None else args.rows]
    texts = [render_row(row, config.objective.refusal_token).append("\n") for row in shown]
    texts.append(legend(config.objective.refusal_token))
    for text in texts:
        console.print(text, soft_wrap=True)
    if args.svg:
        save_picture(texts, args.svg)
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


def _protect(args: argparse.Namespace) -> None:
    from derta_jax.training.pod.cluster import joined
    from derta_jax.training.protect.config import load_protection
    from derta_jax.training.protect.phases import protect

    config = load_protection(args.config, args.overrides)
    with joined(config.vectors.processes):
        protect(config, _console(), args.dry_run)


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


def _bench(args: argparse.Namespace) -> None:
    from derta_jax.benchmark import data, generation, report, sweep
    from derta_jax.benchmark.config import load_bench
    from derta_jax.benchmark.contest import run_bench

    console = _console(quiet=args.json)
    what = args.config if args.overrides and args.config in ("data", "generate", "sweep") else "steps"
    config, *overrides = args.overrides if what != "steps" else [args.config, *args.overrides]
    if what == "data":
        results = data.bench_data(load_config(config, overrides), console)
        table = data.data_table(results)
    elif what == "generate":
        results = generation.bench_generation(load_bench(config, overrides), console)
        table = generation.generation_table(results)
    elif what == "sweep":
        results = sweep.sweep(config, overrides, console)
        table = sweep.sweep_table(results)
    else:
        results = run_bench(load_bench(config, overrides), console)
        table = report.table_of(results)
    if args.json:
        print(json.dumps(results, indent=2))
    console.print(table)
    if what == "steps":
        for line in report.ratios_of(results):
            console.print(line, highlight=False)
    if args.output and what == "steps":
        report.write_report(results, Path(args.output))
    if args.output and what == "sweep":
        sweep.write_sweep(results, Path(args.output))


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


COMMANDS: dict[str, Run] = {
    "demo": _demo,
    "prepare": _prepare,
    "inspect": _inspect,
    "train": _train,
    "protect": _protect,
    "doctor": _doctor,
    "plan": _plan,
    "bench": _bench,
    "generate": _generate,
    "serve": _serve,
    "evaluate": _evaluate,
    "judge": _judge,
    "answers": _answers,
    "export": _export,
    "convert": _convert,
}


if __name__ == "__main__":
    sys.exit(main())
