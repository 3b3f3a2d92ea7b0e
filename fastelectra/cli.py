"""`fastelectra <command>`: one table of commands, each imported only when it is used."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastelectra import __version__, errors

COMMANDS = {  # name: (module, function that adds its arguments, function that runs it, help)
    "prepare": ("data.prepare", "add_arguments", "run", "turn text into token shards"),
    "train": ("train", "add_arguments", "run", "pre-train in this process (see also: deepspeed)"),
    "finetune": ("tasks.finetune", "add_arguments", "run", "fine-tune on one task"),
    "glue": ("tasks.finetune", "add_glue_arguments", "run_glue", "fine-tune on all tasks of GLUE"),
    "explain": ("explain", "add_arguments", "run", "show what both networks make of a sentence"),
    "export": ("hub", "add_export_arguments", "run_export", "write Hugging Face checkpoints"),
    "import": ("hub", "add_import_arguments", "run_import", "start from Hugging Face checkpoints"),
    "flops": ("training.flops", "add_arguments", "run", "count the arithmetic of a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Bad usage exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fastelectra", description="Pre-train ELECTRA on your own text"
    )
    parser.add_argument("--version", action="version", version=f"fastelectra {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module_name, add_arguments, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:  # only the chosen command pays for its imports
            module = importlib.import_module(f"fastelectra.{module_name}")
            getattr(module, add_arguments)(command)
            command.set_defaults(run=getattr(module, run))
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


def console() -> None:
    """Entry point of the installed `fastelectra` command."""
    sys.exit(errors.run(main))


if __name__ == "__main__":
    console()
