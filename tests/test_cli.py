"""The installed command and package, from a folder of their own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastelectra import __version__, errors
from fastelectra.cli import COMMANDS, main
from fastelectra.errors import FastElectraError

COMMAND = str(Path(sys.executable).with_name("fastelectra"))


def output(folder, *command):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_version(tmp_path):
    assert output(tmp_path, COMMAND, "--version").stdout.split() == ["fastelectra", __version__]


def test_help_names_every_command(tmp_path):
    done = output(tmp_path, COMMAND, "--help")
    assert done.returncode == 0
    for name, (*_, text) in COMMANDS.items():
        assert name in done.stdout
        assert text in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_own_help(tmp_path, command):
    done = output(tmp_path, COMMAND, command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: fastelectra {command}")


@pytest.mark.parametrize("arguments", [[], ["explode"], ["export"], ["explain", "hello"]])
def test_bad_usage_is_two_and_no_traceback(tmp_path, arguments):
    done = output(tmp_path, COMMAND, *arguments)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_is_one_line_whatever_a_file_has_for_names(capsys):
    def main(_):
        raise FastElectraError("of\n\x1b[2J\ud800 ‘näme’")

    assert errors.run(main) == 2
    assert capsys.readouterr().err == "error: of\\n\\x1b[2J\\ud800 ‘näme’\n"


@pytest.mark.parametrize(
    "command",
    ["finetune --task rte --data=~/glue --out=~/new --model=~/none",
     "explain text --model=~/none", "explain text --model=. --generator=~/none",
     "train --config=~/none", "flops --config=~/none", "import . --out=~/none"],
)  # fmt: skip
def test_a_home_that_the_shell_leaves_alone(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    parsed = []
    name, *arguments = command.split()
    module, _, run, _ = COMMANDS[name]
    monkeypatch.setattr(f"fastelectra.{module}.{run}", parsed.append)
    main([name, *arguments])
    values = vars(parsed[0]).values()
    assert str(tmp_path / "none") in values
    assert not any(str(value).startswith("~") for value in values)


def test_a_terminal_of_few_characters_ends_nothing():
    config = Path(__file__).parents[1] / "configs/demo.json"
    done = subprocess.run(
        [COMMAND, "flops", "--config", str(config)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\\u2019" in done.stdout


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    config = Path(__file__).parents[1] / "configs/demo.json"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [COMMAND, "flops", "--config", str(config)],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
    closed = f"{shlex.quote(str(COMMAND))} flops --config {shlex.quote(str(config))} >&-"
    done = subprocess.run(closed, shell=True, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_kernels_are_ours_and_not_at_top_level(tmp_path):
    code = (
        "import fastelectra.kernels, importlib.util;"
        "print(fastelectra.kernels.__file__, importlib.util.find_spec('kernels'))"
    )
    done = output(tmp_path, sys.executable, "-c", code)
    file, top_level = done.stdout.split()
    assert Path(file).parent.name == "kernels"
    assert top_level == "None"
