"""Runs that are killed, stopped, or robbed of their disk: nothing is lost that was promised."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import (
    PLAIN,
    assert_same_checkpoint,
    deepspeed,
    environment,
    records,
    tiny_config,
    torchrun,
)

from fastelectra.training import checkpoint, stopping

KILLS = int(os.environ.get("FASTELECTRA_KILLS", "5"))
STEPS = 60


def eager_config(corpus: Path, run: Path, **training) -> dict:
    """Every step is logged; a checkpoint after every third."""
    fields = {"steps": STEPS, "log_every": 1, "checkpoint_every": 3, "eval_every": STEPS}
    return tiny_config(corpus, run, **{**fields, **training})


def assert_same_run(run: Path, expected: Path) -> None:
    """Bit for bit: every step's scores, the last weights and moments."""
    assert records(run) == records(expected)
    assert_same_checkpoint(run, expected, tolerance=0)


def steps_of(front: subprocess.Popen) -> Iterator[int]:
    """The number of each step as the run prints it."""
    for line in front.stdout:
        print(line, end="")
        if match := re.match(r"step +([\d,]+)/", line):
            yield int(match[1].replace(",", ""))


def reach(front: subprocess.Popen, step: int) -> None:
    """Return when the run has made so many steps."""
    assert any(done >= step for done in steps_of(front)), f"ended before step {step}"


def ranks_of(front: subprocess.Popen) -> list[int]:
    """The process ids of a launcher's ranks, in their order."""
    found, level = [], [front.pid]
    while level:
        children = []
        for pid in level:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                children += map(int, task.read_text().split())
        found += [p for p in children if b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
        level = children
    return sorted((pid for pid in found if not is_launcher(pid)), key=rank_of)


def is_launcher(pid: int) -> bool:
    return b"deepspeed.launcher" in Path(f"/proc/{pid}/cmdline").read_bytes()


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v[5:]) for v in variables if v.startswith(b"RANK="))


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    """The run folder of 60 steps, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "config.json").write_text(json.dumps(eager_config(corpus, folder / "run")))
    command = [*PLAIN, "--config", str(folder / "config.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def kill_somewhere(front: subprocess.Popen, run: Path, chance: random.Random) -> str:
    """End the run at a random moment with SIGKILL; returns when that was, or that it was over."""
    kind = chance.choice(["starting", "training", "saving", "saving"])
    if kind == "starting":
        time.sleep(chance.uniform(0, 8))
    else:
        least = next(steps_of(front), STEPS) + chance.randrange(15)
        if least < STEPS:
            next((done for done in steps_of(front) if done >= least), None)
        while kind == "saving" and front.poll() is None:
            if any((run / "checkpoints").glob(".tmp-*")):
                break  # it is being written
        time.sleep(chance.uniform(0, 0.03))
    over = front.poll() is not None
    if not over:
        os.killpg(front.pid, signal.SIGKILL)
    front.wait()
    return "over" if over else kind


def test_kill_9_at_any_moment_changes_nothing(corpus, straight, start, train, tmp_path):
    chance, kills, runs, kinds = random.Random(0), 0, 0, []
    while kills < KILLS:
        run = tmp_path / f"run-{runs}"
        config = eager_config(corpus, run)
        left_aside = 0
        while kills < KILLS:
            launcher = chance.choice([PLAIN, deepspeed(1)])
            kind = kill_somewhere(start(launcher, config), run, chance)
            if kind == "over":
                break
            kills += 1
            left_aside += len(list((run / "checkpoints").glob(".tmp-*")))
            kinds.append(kind)
        code, output = train(PLAIN, config)
        assert code == 0, output
        assert_same_run(run, straight)
        assert not list((run / "checkpoints").glob(".tmp-*"))
        print(f"run {runs}: {kinds}, {left_aside} killed while a checkpoint was being written")
        shutil.rmtree(run)
        runs, kinds = runs + 1, []


@pytest.mark.parametrize(
    ("number", "launcher"),
    [(signal.SIGTERM, None), (signal.SIGINT, None), (signal.SIGUSR1, deepspeed)],
)
def test_a_signal_saves_and_the_run_goes_on(
    corpus, straight, start, train, tmp_path, number, launcher
):
    """In one process, or to one rank of two."""
    run = tmp_path / "run"
    config = eager_config(corpus, run, checkpoint_every=1000)
    front = start(launcher(2) if launcher else PLAIN, config)
    reach(front, 4)
    os.kill(ranks_of(front)[1] if launcher else front.pid, number)
    output = front.stdout.read()
    assert front.wait(timeout=60) == 0, output
    stopped = re.search(r"^stopped after step (\d+): SIG\w+ was received", output, re.MULTILINE)
    assert stopped, output
    assert signal.Signals(number).name in stopped[0]
    assert int(checkpoint.resolve(run).name[5:]) == int(stopped[1]) == records(run)[-1]["step"]
    if number == signal.SIGTERM:
        code, output = train(PLAIN, config)
        assert code == 0, output
        assert_same_run(run, straight)


@pytest.mark.parametrize("whom", ["front", "group"])
def test_the_launcher_takes_its_ranks_along_and_they_save(corpus, start, tmp_path, whom):
    """kill -TERM of the deepspeed command; Ctrl-C, which goes to all of its processes."""
    run = tmp_path / "run"
    front = start(deepspeed(2), eager_config(corpus, run, steps=10**6, checkpoint_every=10**6))
    reach(front, 4)
    ranks = ranks_of(front)
    if whom == "front":
        os.kill(front.pid, signal.SIGTERM)
    else:
        os.killpg(front.pid, signal.SIGINT)
    output = front.stdout.read()  # until the last of them has ended
    assert "\nstopped after step " in output, output
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    saved = [path.name for path in checkpoint.complete_checkpoints(run)]
    assert saved == [f"step-{records(run)[-1]['step']:08d}"]


def test_a_second_signal_ends_the_run_at_once(corpus, start, tmp_path):
    config = eager_config(corpus, tmp_path / "run", steps=10**6, batch_tokens=8_000_000)
    config["training"]["micro_batch_tokens"] = 400  # a step takes minutes
    front = start(PLAIN, config)
    for line in front.stdout:
        if line.startswith("batch: "):
            break
    time.sleep(5)
    os.kill(front.pid, signal.SIGTERM)
    time.sleep(4)
    assert front.poll() is None  # it is finishing the step
    os.kill(front.pid, signal.SIGTERM)
    assert front.wait(timeout=20) == 128 + signal.SIGTERM
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_second_signal_ends_a_rank_that_waits_for_another(start, tmp_path):
    """Its main thread is in a call that does not return, where Python runs no handlers."""
    program = tmp_path / "waits.py"
    program.write_text(
        "import hashlib, torch\n"
        "from fastelectra.training import launch, stopping\n"
        "launch.FORWARDED = 0.2\n"
        "torch.distributed.init_process_group("
        "'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)\n"
        "with stopping.Stop().listening():\n"
        "    print('waits', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    front = start([sys.executable, str(program)], {})
    assert front.stdout.readline() == "waits\n"
    for _ in range(2):
        os.kill(front.pid, signal.SIGTERM)
        time.sleep(0.5)
    assert front.wait(timeout=20) == 128 + signal.SIGTERM


def test_no_listener_is_left(monkeypatch):
    """One that ended with the interpreter, the last to hold the group, would abort the process."""
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: None)
    threads = threading.enumerate()
    for _ in range(20):
        with stopping.Stop().listening():
            pass
        assert set(threading.enumerate()) <= set(threads)


def test_max_hours(corpus, train, tmp_path):
    run = tmp_path / "run"
    config = eager_config(corpus, run, steps=10**6, checkpoint_every=10**6)
    code, output = train(deepspeed(2), config, "--max-hours", "0.003")
    assert code == 0, output
    assert re.search(r"^stopped after step \d+: --max-hours 0.003 have passed", output, re.M)
    assert ("learning curves: " in output) == (run / "curves.png").exists()
    assert checkpoint.resolve(run)
    code, output = train(PLAIN, config, "--max-hours", "-1")
    assert code == 2
    assert "--max-hours -1 must be above 0" in output


@pytest.mark.parametrize(("launcher", "rank"), [(deepspeed, 1), (torchrun, 0)])
def test_a_dead_rank_takes_the_run_down(corpus, start, tmp_path, launcher, rank):
    front = start(launcher(2), eager_config(corpus, tmp_path / "run", steps=10**6))
    reach(front, 3)
    ranks = ranks_of(front)
    killed = time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    output = front.stdout.read()
    assert front.wait(timeout=60) != 0
    took = time.monotonic() - killed
    assert took < 40, f"{took:.0f} s"
    print(f"{took:.1f} s")
    cause = r"-9|SIGKILL|lost the connection to another process of this run: it has ended"
    assert re.search(cause, output), output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def on_a_small_disk(place: Path, kilobytes: int, launcher: list[str]) -> list[str]:
    """The command with a tmpfs of that size at `place`, which is copied to `kept` at the end."""
    script = (
        f'mount -t tmpfs -o size={kilobytes}k tmpfs {place} && "$@"; code=$?;'
        f" cp -r {place} {place}-kept; exit $code"
    )
    return ["unshare", "-m", "bash", "-c", script, "bash", *launcher]


needs_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="a small tmpfs takes the right to mount one",
)


@needs_mount
@pytest.mark.parametrize("stops", [True, False])
def test_a_full_disk(corpus, straight, train, tmp_path, stops):
    """Room for two checkpoints: the third cannot be written, and the two are as they were.

    The last one must be, in any case.
    """
    (tmp_path / "disk").mkdir()
    one = sum(f.stat().st_size for f in checkpoint.resolve(straight).rglob("*") if f.is_file())
    config = eager_config(corpus, tmp_path / "disk" / "run", steps=30, keep_last=9, eval_every=30,
                          stop_when_not_saved=stops)  # fmt: skip
    # steps go on while a checkpoint is written, but not beyond the next one's
    small = on_a_small_disk(tmp_path / "disk", int(2.6 * one / 1024), deepspeed(2))
    code, output = train(small, config)
    failed = "cannot write the checkpoint .*9: No space left|another process could not write"
    assert re.search(failed, output), output
    assert code == 2
    assert len(re.findall("^error: ", output, re.MULTILINE)) == 1
    went_on = re.search("^warning: .*; training goes on$", output, re.MULTILINE)
    assert bool(went_on) == ("step 30/30" in output) == (not stops)
    kept = tmp_path / "disk-kept" / "run"
    assert [f.name for f in (kept / "checkpoints").iterdir() if f.name[0] == "."] == []
    assert [f.name for f in checkpoint.complete_checkpoints(kept)] == [
        "step-00000003", "step-00000006"
    ]  # fmt: skip
    for folder in checkpoint.complete_checkpoints(kept):
        checkpoint.verify(folder)
    assert records(kept)[0]["step"] == 1
