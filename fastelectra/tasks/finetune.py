"""`fastelectra finetune`: one task of GLUE, or your own; `fastelectra glue`: all of GLUE.

Several processes, started by torchrun or deepspeed, share the runs.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from fastelectra.errors import FastElectraError
from fastelectra.outputs import claim
from fastelectra.tasks import reading
from fastelectra.tasks.reading import HUB, has_task
from fastelectra.tasks.table import (
    ABOVE,
    BATCH,
    GOOGLE,
    MAX_LENGTH,
    PAPER,
    TASKS,
    Task,
    custom,
    plain,
    recipe_of,
)
from fastelectra.training import launch
from fastelectra.training.launch import Process

SHOWN = 12  # classes, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastelectra finetune`."""
    names = {plain(name): name for name in (*TASKS, "custom")}
    parser.add_argument(
        "--task", required=True, choices=names.values(), metavar="TASK",
        type=lambda text: names.get(plain(text), text), help=f"{', '.join(TASKS)} or custom",
    )  # fmt: skip
    parser.add_argument("--text", metavar="COLUMN[,COLUMN]", help="of a custom task")
    parser.add_argument("--label", metavar="COLUMN", help="of a custom task")
    parser.add_argument("--epochs", type=positive(int), help="default: the paper's for the task")
    _add_common(parser, "folder of the task or of all")


def add_glue_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastelectra glue`."""
    parser.set_defaults(epochs=None)
    _add_common(parser, "folder of all tasks' folders (CoLA, SST-2 …)")


def _add_common(parser: argparse.ArgumentParser, data: str) -> None:
    path = os.path.expanduser  # shells leave the ~ in --out=~/scores
    parser.add_argument(
        "--model", required=True, type=path, metavar="DIR",
        help="run folder, checkpoint, export, or Hugging Face Electra model",
    )  # fmt: skip
    parser.add_argument(
        "--data", required=True, type=path, metavar="DIR",
        help=f"{data}, of .tsv, .csv, .jsonl or .parquet; {HUB}: download it",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=positive(int), metavar="N",
        help=f"tokens of an example; longer ones are cut (default {MAX_LENGTH}, as in the paper)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--seeds", type=positive(int), default=1, metavar="N", help="runs (default 1)"
    )
    parser.add_argument(
        "--lr", type=positive(float), help="peak learning rate; default: the paper's for the size"
    )
    parser.add_argument(
        "--layer-decay", choices=[*ABOVE], default=GOOGLE,
        help="of the learning rate from layer to layer: google has one power more below the head,"
        " as in the paper's results (default), plain has not",
    )  # fmt: skip


def positive(kind: type) -> Callable:
    """For argparse: a finite number above 0 of this kind."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    return parse


def run(args: argparse.Namespace) -> int:
    """Fine-tune on one task. Raises FastElectraError, on every rank."""
    process = launch.prepare()
    with launch.one_voice(process):
        if args.task == "custom":
            if not args.text or not args.label:
                raise FastElectraError("--task custom needs --text COLUMN[,COLUMN] --label COLUMN")
            task = custom(args.text, args.label)
        elif args.text or args.label:
            raise FastElectraError("--text and --label are for --task custom")
        else:
            task = TASKS[args.task]
            if task.uses and (args.seeds != 1 or args.lr or args.epochs):
                raise FastElectraError(
                    f"--task {task.name} is not trained, but predicted with the model of"
                    f" {task.uses}: leave out --seeds, --lr and --epochs"
                )
        _run_tasks([(task, Path(args.out))], args, process)
    return 0


def run_glue(args: argparse.Namespace) -> int:
    """Fine-tune on every task of GLUE that is there. Raises FastElectraError, on every rank."""
    process = launch.prepare()
    with launch.one_voice(process):
        present = [task for task in TASKS.values() if has_task(task, args.data)]
        if not present:
            raise FastElectraError(
                f"--data {args.data} has none of GLUE's folders: "
                + ", ".join(task.folder for task in TASKS.values())
                + "; one task's own is for `fastelectra finetune`"
            )
        missing = [task.folder for task in TASKS.values() if task not in present]
        if missing:
            process.say(f"not in {args.data}, left out: {', '.join(missing)}")
        names = {task.name for task in present}
        for task in [task for task in present if task.uses and task.uses not in names]:
            process.say(f"left out {task.folder}, which takes the model of {task.uses}")
            present.remove(task)
        out = Path(args.out)
        results = _run_tasks([(task, out / task.name) for task in present], args, process)
        if process.leads and results:
            medians = {r["task"]: 100 * r["median"]["dev"][r["metric"]] for r in results}
            process.say(table(medians, results[0]["settings"]["size"]))
    return 0


def _run_tasks(
    tasks: Sequence[tuple[Task, Path]], args: argparse.Namespace, process: Process
) -> list[dict]:
    """Make all runs of all tasks; returns each task's results, on rank 0."""
    # after launch.prepare, whose settings they read
    import torch

    from fastelectra.tasks import pretrained
    from fastelectra.tasks.runs import FILES, LOCK, RESULT, Options, Runs, predict_with, run_all

    device = launch.device()
    start = pretrained.load(args.model)
    for task in (task for task, _ in tasks if task.uses):
        reading.read_task(task, args.data)  # to know now what is wrong with it
    submission = Path(args.out) / "submission"
    options = Options(
        args.model, args.data, submission, args.seeds, args.lr, args.epochs, args.layer_decay,
        args.max_length,
    )  # fmt: skip
    trained = [Runs(task, start, options, out, device) for task, out in tasks if not task.uses]
    results = []
    with ExitStack() as locks:
        if process.world > 1:  # some have longer runs than others: no time is too long to wait
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        for folder in dict.fromkeys([Path(args.out), *(out for _, out in tasks)]):
            if process.leads:
                seeds = [*folder.glob(f"seed-*/{RESULT}"), *folder.glob(f"*/seed-*/{RESULT}")]
                locks.enter_context(claim(folder / LOCK, "--out", () if seeds else FILES))
        if process.world > 1:  # what rank 0 has refused, no other begins
            torch.distributed.barrier()
        for line in _opening(start, trained):
            process.say(line)
        run_all(trained, process)
        for runs in trained if process.leads else ():
            results.append(runs.finish())
            process.say(f"{_summary(results[-1])}\nwrote {runs.out}")
        for task, out in tasks if process.leads else ():
            if task.uses:
                maker = next((runs.out for runs in trained if runs.task.name == task.uses), None)
                maker = pretrained.load(maker) if maker else start
                predict_with(task, maker, options, out, device)
                process.say(f"{task.name}: predicted with {maker.folder}\nwrote {out}")
        if process.world > 1:
            torch.distributed.destroy_process_group()
    return results


def _opening(start, trained: Sequence) -> Iterator[str]:
    """What is done, one thing a line."""
    yield f"model: {start.folder}, of ELECTRA-{recipe_of(start.model.hidden_size).size}'s class"
    for runs in trained:
        settings = runs.settings
        yield from filter(None, (split.left_out for split in runs.splits.values()))
        yield (
            f"{runs.task.name}: "
            + ", ".join(f"{len(split.texts):,} {name}" for name, split in runs.splits.items())
            + f"; {settings.epochs} epochs of batches of {BATCH}, lr {settings.lr:g}, layer decay"
            f" {settings.layer_decay:g} ({settings.decay_convention}), {settings.precision}"
        )
        if runs.task.name == "custom":
            yield f"custom: {_learned(runs.task, runs.splits['train'].labels)}"


def _learned(task: Task, labels: Sequence[float]) -> str:
    """What the labels of a training set are: classes, the most frequent first, or numbers."""
    if not task.labels:
        return f"regression, {min(labels) * task.scale:g} to {max(labels) * task.scale:g}"
    counts = Counter(task.labels[int(label)] for label in labels).most_common()
    shown = [f"{' '.join(name.split())} {count:,}" for name, count in counts[:SHOWN]]
    return f"{len(counts)} classes: {', '.join(shown)}" + ", …" * (len(counts) > SHOWN)


def _summary(results: dict) -> str:
    """Median and spread of each metric, one set a line."""
    count = len(results["runs"])
    lines = [f"{results['task']}: " + (f"median of {count} seeds" if count > 1 else "one seed")]
    for split, scores in results["median"].items():
        parts = []
        for name, median in scores.items():
            low, high, sd = (100 * results[kind][split][name] for kind in ("min", "max", "sd"))
            spread = f" ({low:.1f} to {high:.1f}, sd {sd:.1f})" if count > 1 else ""
            parts.append(f"{name} {100 * median:.1f}{spread}")
        lines.append(f"  {split:<8}" + "  ".join(parts))
    return "\n".join(lines)


def table(medians: dict[str, float], size: str) -> str:
    """Our dev medians by task (of 100) below those published for a size; means where complete."""
    published = PAPER[size]
    rows = [["", *(TASKS[name].folder for name in published), "mean"]]
    for title, values in ((f"published, {size}", published), ("this model", medians)):
        shown = [values.get(name) for name in published]
        shown.append(None if None in shown else sum(shown) / len(shown))
        rows.append([title, *("–" if value is None else f"{value:.1f}" for value in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(map("  ".join, lines))
