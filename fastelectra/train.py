"""Pre-train ELECTRA; the same command again resumes.

    deepspeed fastelectra/train.py --config configs/base.json [--set section.field=value …]

also under torchrun, and in one process as `fastelectra train` or plain python.
"""

import argparse
import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first: our data/ would hide another `data`

from fastelectra import errors
from fastelectra.config import add_config_arguments, load_config
from fastelectra.data.shards import open_corpus
from fastelectra.training import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_config_arguments(parser)
    parser.add_argument(
        "--max-hours", type=float, metavar="H", help="save and exit after so many hours"
    )
    parser.add_argument(
        "--verify", action="store_true",
        help="first compare every byte of the corpus with its checksums",
    )  # fmt: skip
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers add it


def run(args: argparse.Namespace) -> int:
    """Train as the arguments say. Raises FastElectraError, on every rank."""
    process = launch.prepare()
    with launch.one_voice(process):
        if args.max_hours is not None and not args.max_hours > 0:
            raise errors.FastElectraError(f"--max-hours {args.max_hours:g} must be above 0")
        config = load_config(args.config, args.set)
        if not config.training.output_dir:
            raise errors.FastElectraError(
                "training.output_dir is not set: name the folder of this run"
            )
        launch.accumulation(config, process)
        corpus = open_corpus(config.data.path)
        if args.verify:
            corpus.verify()

        # after all that can be checked without them; they read what launch.prepare has set
        from fastelectra.training.engine import plan_engine
        from fastelectra.training.loop import Trainer
        from fastelectra.training.opening import opening
        from fastelectra.training.report import check_outputs
        from fastelectra.training.resume import find_start

        plan = plan_engine(config, process)
        start = find_start(config, corpus)
        if start.step >= config.training.steps:
            process.say(f"{start.folder}: this run is finished; raise training.steps to go on")
            return 0
        trainer = Trainer(config, corpus, process, plan, start)
        if process.leads:
            trainer.lock = check_outputs(config)  # the first that writes
        for line in opening(trainer):
            process.say(line)
        trainer.train(args.max_hours)
        return 0


def main(argv: list[str] | None = None) -> int:
    """The command line of `deepspeed fastelectra/train.py`."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.partition(";")[0])
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(errors.run(main))
