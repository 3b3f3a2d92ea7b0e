"""A checkpoint goes on with any number of ranks at any ZeRO stage, and on several machines."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from launching import TRAIN, assert_same_checkpoint, environment, free_port, records, tiny_config

from fastelectra.training import checkpoint

MANY_RUNS = Path(__file__).with_name("many_runs.py")
BIN = Path(sys.executable).parent
PLACES = list(product((1, 2), ("none", *range(4))))  # (ranks, stage), "none": the plain engine
PAIRS = list(product(PLACES, PLACES))
if "FASTELECTRA_PAIRS" not in os.environ:  # each place once on either side, ranks and stage change
    NEXT = {"none": 0, 0: 1, 1: 2, 2: 3, 3: "none"}
    PAIRS = [(place, (3 - place[0], NEXT[place[1]])) for place in PLACES]
SCORES = ("loss", "mlm_loss", "disc_loss", "auc", "fake_rate", "mlm_accuracy", "grad_norm")


def config_at(corpus: Path, run: Path, stage: int | str, bf16: bool = False) -> Path:
    """Eight logged steps; checkpoints after four and eight."""
    config = tiny_config(corpus, run, steps=8, log_every=1, eval_every=8, checkpoint_every=4)
    config["deepspeed"] = {"bf16": {"enabled": bf16}}
    if stage != "none":
        config["deepspeed"]["zero_optimization"] = {"stage": stage}
    path = run.with_suffix(".json")
    path.write_text(json.dumps(config))
    return path


def launch(ranks: int, configs: list[Path]) -> str:
    """Make the runs; what they printed."""
    command = [BIN / "torchrun", "--nproc_per_node", str(ranks), "--master_port", free_port()]
    done = subprocess.run(
        [*map(str, command), str(MANY_RUNS), *map(str, configs)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_same_run(run: Path, expected: Path, tolerance: float) -> None:
    """The same examples, masks and samples; losses, weights and moments within the tolerance."""
    for a, b in zip(records(run), records(expected), strict=True):
        assert (a["kind"], a["step"], a["tokens"]) == (b["kind"], b["step"], b["tokens"])
        for name in SCORES:
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name
    assert_same_checkpoint(run, expected, tolerance)


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> dict[tuple[int, int], Path]:
    """A run of eight steps at each number of ranks and stage."""
    folder = tmp_path_factory.mktemp("saved")
    runs = {place: folder / "{}-ranks-stage-{}".format(*place) for place in PLACES}
    for ranks in (1, 2):
        launch(ranks, [config_at(corpus, runs[place], place[1])
                       for place in PLACES if place[0] == ranks])  # fmt: skip
    return runs


def test_places_agree_and_ranks_share_the_writing(saved):
    for place, run in saved.items():
        assert_same_run(run, saved[1, 0], tolerance=1e-4)
        files = {f.name for f in checkpoint.resolve(run).glob("*.safetensors")}
        parts = ["-00001-of-00002", "-00002-of-00002"] if place[0] == 2 else [""]
        assert files == {f"{n}{p}.safetensors" for n in ("model", "optimizer") for p in parts}
        sizes = [(checkpoint.resolve(run) / f"model{p}.safetensors").stat().st_size for p in parts]
        assert max(sizes) < 1.2 * min(sizes)


def test_a_checkpoint_goes_on_at_any_place(corpus, saved, tmp_path):
    configs, runs = {1: [], 2: []}, []
    for number, (source, (ranks, stage)) in enumerate(PAIRS):
        run = shutil.copytree(saved[source], tmp_path / f"run-{number}")
        shutil.rmtree(checkpoint.checkpoint_folder(run, 8))
        configs[ranks].append(config_at(corpus, run, stage))
        runs.append(run)
    for ranks, paths in configs.items():
        printed = launch(ranks, paths)
        assert printed.count("resuming from") == len(paths)  # rank 0 alone speaks
    for run in runs:
        assert checkpoint.resolve(run).name == "step-00000008"
        assert_same_run(run, saved[1, 0], tolerance=1e-4)


@pytest.mark.parametrize("places", [PLACES[:5], [(2, "none")]])
def test_bf16_goes_on_to_the_bit(corpus, tmp_path, places):
    ranks = places[0][0]
    straight = {stage: tmp_path / f"stage-{stage}" for _, stage in places}
    launch(ranks, [config_at(corpus, run, stage, bf16=True) for stage, run in straight.items()])
    again = {
        stage: shutil.copytree(run, tmp_path / f"{run.name}-again")
        for stage, run in straight.items()
    }
    for run in again.values():
        shutil.rmtree(checkpoint.checkpoint_folder(run, 8))
    launch(ranks, [config_at(corpus, run, stage, bf16=True) for stage, run in again.items()])
    for stage, run in again.items():
        assert_same_run(run, straight[stage], tolerance=0)


def torchrun_nodes(port: str) -> list[list[str]]:
    """As in the README: the same command on both machines, here on one."""
    return [
        [str(BIN / "torchrun"), "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1",
         "--master_addr", "127.0.0.1", "--master_port", port, str(TRAIN)]
        for node in (0, 1)
    ]  # fmt: skip


def deepspeed_nodes(port: str) -> list[list[str]]:
    """DeepSpeed's hostfile without ssh, which two machines would need."""
    return [
        [str(BIN / "deepspeed"), "--hostfile", "hosts", "--no_ssh", "--node_rank", str(node),
         "--master_addr", "127.0.0.1", "--master_port", port, str(TRAIN)]
        for node in (0, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("nodes", [torchrun_nodes, deepspeed_nodes])
def test_two_launchers_are_one_run(corpus, saved, tmp_path, nodes):
    config = config_at(corpus, tmp_path / "run", 1)
    (tmp_path / "hosts").write_text("node-0 slots=1\nnode-1 slots=1\n")
    launchers = [
        subprocess.Popen(
            [*command, "--config", str(config)], env=environment(), cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command in nodes(free_port())
    ]  # fmt: skip
    outputs = [launcher.communicate()[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "finished; on held-out text" in outputs[0]
    assert_same_run(tmp_path / "run", saved[2, 1], tolerance=0)
