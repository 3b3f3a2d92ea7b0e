"""Checkpoint folders: complete or absent, newest found, damage reported in one line."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from fastelectra.data import vocabulary
from fastelectra.errors import FastElectraError
from fastelectra.training import checkpoint


@pytest.fixture
def tokenizer_dir(tmp_path):
    folder = tmp_path / "corpus-tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


def write(run, step, tokenizer_dir, size=8):
    weights = {"a.weight": torch.arange(size, dtype=torch.float32), "a.bias": torch.full((3,), 2.5)}
    moments = {f"{name}.{key}": value / 3 for name, value in weights.items()
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    target = checkpoint.checkpoint_folder(run, step)
    state = {"step": step, "position": {"shard": 3}, "config": {"model": {}}, "vocab_size": 2,
             "special_tokens": {"pad": 0}, "fingerprint": "f"}  # fmt: skip
    with checkpoint.reported(target), checkpoint.write_folder(target) as folder:
        checkpoint.write_share(folder, weights, moments)
        checkpoint.write_rest(folder, tokenizer_dir, state)
    return target, weights, moments


def test_what_is_written_is_read_back(tmp_path, tokenizer_dir):
    target, weights, moments = write(tmp_path / "run", 1000, tokenizer_dir)
    assert target.name == "step-00001000"
    for stored, read in ((weights, checkpoint.read_weights(target)),
                         (moments, checkpoint.read_moments(target))):  # fmt: skip
        assert stored.keys() == read.keys()
        assert all(torch.equal(stored[name], read[name]) for name in stored)
    state = checkpoint.read_state(target)
    assert state == {"format": 1, "step": 1000, "position": {"shard": 3}, "config": {"model": {}},
                     "vocab_size": 2, "special_tokens": {"pad": 0}, "fingerprint": "f",
                     "skipped": 0, "loss_scale": {}}  # fmt: skip
    assert (target / "tokenizer" / "vocab.txt").read_text() == "[PAD]\n[UNK]\n"


def test_resolve_takes_a_checkpoint_or_the_newest_complete_one_of_a_run(tmp_path, tokenizer_dir):
    run = tmp_path / "run"
    first, *_ = write(run, 5, tokenizer_dir)
    second, *_ = write(run, 10, tokenizer_dir)
    damaged, *_ = write(run, 15, tokenizer_dir)
    (damaged / "state.json").unlink()
    (run / "checkpoints" / ".tmp-step-00000020").mkdir()
    assert checkpoint.resolve(run) == second
    assert checkpoint.resolve(first) == first
    for nothing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FastElectraError, match="no checkpoint in"):
            checkpoint.resolve(nothing)
    checkpoint.tidy(run, keep_last=1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]


def test_a_run_at_work_may_remove_what_is_read(tmp_path, tokenizer_dir, monkeypatch):
    run, seen = tmp_path / "run", []
    write(run, 5, tokenizer_dir)

    def goes_on(folder):
        write(run, 5 * (len(seen) + 2), tokenizer_dir)
        checkpoint.tidy(run, keep_last=1)
        seen.append(folder.name)

    def read(folder):
        if len(seen) < 3:
            goes_on(folder)
        return checkpoint.read_state(folder)["step"]

    assert checkpoint.use(run, read) == 20
    assert seen == ["step-00000005", "step-00000010", "step-00000015"]
    verify = checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda folder: (
        goes_on(folder) if len(seen) < 5 else None, verify(folder)))  # fmt: skip
    assert checkpoint.newest_good(run) == (checkpoint.checkpoint_folder(run, 30), {})

    verify_folder = checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda folder: (
        verify_folder(folder), goes_on(folder) if len(seen) < 7 else None))  # fmt: skip
    assert checkpoint.newest_good(run) == (checkpoint.checkpoint_folder(run, 40), {})

    def tokenizer(folder):
        if len(seen) < 9:
            goes_on(folder)
        return (folder / "state.json").read_bytes(), vocabulary.files(folder / "tokenizer").keys()

    assert "vocab.txt" in checkpoint.use(run, tokenizer)[1]
    with monkeypatch.context() as patch:
        read_bytes = Path.read_bytes

        def one_is_the_last(path):
            content = read_bytes(path)
            path.parent.rename(path.parent.with_name("gone"))
            return content

        (tmp_path / "tokenizer").mkdir()
        for name in ("tokenizer.json", "vocab.txt"):
            (tmp_path / "tokenizer" / name).write_text("{}")
        patch.setattr(Path, "read_bytes", one_is_the_last)
        with pytest.raises(FastElectraError, match="has no tokenizer"):
            vocabulary.files(tmp_path / "tokenizer")
    (run / "checkpoints" / "step-00000999").symlink_to(tmp_path / "on a disk that is not mounted")
    newest, damaged = checkpoint.newest_good(run)
    assert (newest.name, len(damaged)) == ("step-00000050", 1)

    def cannot(folder):
        raise FastElectraError("for another reason")

    inside = checkpoint.checkpoint_folder(run, 50)
    monkeypatch.chdir(inside / "tokenizer")
    for name in (run, inside, inside / "tokenizer/..", ".."):
        with pytest.raises(FastElectraError, match="for another reason"):
            checkpoint.use(name, cannot)
    monkeypatch.chdir(inside)
    with pytest.raises(FastElectraError, match="for another reason"):
        checkpoint.use(".", cannot)


def test_damage_is_noticed_and_an_older_checkpoint_taken(tmp_path, tokenizer_dir, capsys):
    run = tmp_path / "run"
    good, *_ = write(run, 5, tokenizer_dir)
    for step, name in enumerate(["model.safetensors", "optimizer.safetensors", "state.json",
                                 "tokenizer/vocab.txt", "SHA256SUMS"], 10):  # fmt: skip
        path = write(run, step, tokenizer_dir)[0] / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    (write(run, 20, tokenizer_dir)[0] / "SHA256SUMS").unlink()
    (write(run, 21, tokenizer_dir)[0] / "SHA256SUMS").write_text("")
    (write(run, 22, tokenizer_dir)[0] / "optimizer.safetensors").unlink()
    found, damaged = checkpoint.newest_good(run)
    assert found == good
    assert [int(path.name[5:]) for path in damaged] == [22, 21, 20, 14, 13, 12, 11, 10]
    assert damaged[checkpoint.checkpoint_folder(run, 22)].endswith("lacks optimizer.safetensors")
    assert damaged[checkpoint.checkpoint_folder(run, 11)].endswith(
        "step-00000011/optimizer.safetensors does not match its checksum"
    )
    assert checkpoint.resolve(run) == good
    assert capsys.readouterr().err.count("warning: passing over") == 8
    for folder in damaged:
        checkpoint.set_aside(folder)
    checkpoint.tidy(run, keep_last=1)
    assert len(list((run / "checkpoints").glob("damaged-*"))) == 8
    assert checkpoint.complete_checkpoints(run) == [good]
    (good / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        FastElectraError, match=r"all checkpoints of .* are damaged, the newest: /.*mo"
    ):
        checkpoint.newest_good(run)


def test_one_of_a_newer_version_is_no_damaged_one(tmp_path, tokenizer_dir):
    run = tmp_path / "run"
    write(run, 5, tokenizer_dir)
    newest, *_ = write(run, 10, tokenizer_dir)
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"format": 2}))
    checkpoint.write_sums(newest)
    with pytest.raises(FastElectraError, match=r"format 2, this version reads format 1: install"):
        checkpoint.newest_good(run)
    with pytest.raises(FastElectraError, match="format 2"):
        checkpoint.resolve(newest)


def test_some_checkpoints_are_kept_for_good(tmp_path, tokenizer_dir):
    run = tmp_path / "run"
    for step in range(5, 50, 5):
        write(run, step, tokenizer_dir)
        checkpoint.tidy(run, keep_last=2, keep_every=15)
    kept = [int(path.name[5:]) for path in checkpoint.complete_checkpoints(run)]
    assert kept == [15, 30, 40, 45]


def test_shares_of_several_ranks_are_one_checkpoint(tmp_path, tokenizer_dir):
    tensors = [{"a": torch.ones(3)}, {"b": torch.zeros(2, 2)}, {}]
    with checkpoint.write_folder(tmp_path / "step-00000005") as folder:
        for rank, share in enumerate(tensors):
            checkpoint.write_share(folder, share, {f"{n}.m": t for n, t in share.items()}, rank, 3)
        checkpoint.write_rest(folder, tokenizer_dir, {"step": 5})
    folder = tmp_path / "step-00000005"
    assert (folder / "model-00001-of-00003.safetensors").is_file()
    checkpoint.verify(folder)
    assert checkpoint.read_weights(folder).keys() == {"a", "b"}
    assert checkpoint.read_moments(folder).keys() == {"a.m", "b.m"}


def test_a_checkpoint_of_a_read_only_corpus_can_be_removed(tmp_path, tokenizer_dir):
    (tokenizer_dir / "vocab.txt").chmod(0o444)
    tokenizer_dir.chmod(0o555)
    target, *_ = write(tmp_path / "run", 5, tokenizer_dir)
    tokenizer_dir.chmod(0o755)
    assert (target / "tokenizer").stat().st_mode & 0o200  # else its owner cannot empty it
    assert (target / "tokenizer" / "vocab.txt").stat().st_mode & 0o200


def test_others_may_read_what_the_umask_lets_them(tmp_path, tokenizer_dir):
    target, *_ = write(tmp_path / "run", 1, tokenizer_dir)
    (usual := tmp_path / "usual").touch()
    for path in target.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode == usual.stat().st_mode, path


def test_what_cannot_be_removed_does_not_matter(tmp_path, tokenizer_dir, monkeypatch):
    """As a checkpoint that another program reads over NFS."""
    run = tmp_path / "run"
    write(run, 1, tokenizer_dir)
    kept, *_ = write(run, 5, tokenizer_dir)
    link = run / "checkpoints" / "step-00000003"
    link.symlink_to(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        checkpoint.tidy(run, keep_last=1)
    assert checkpoint.complete_checkpoints(run) == [kept]
    assert len(list((run / "checkpoints").iterdir())) == 3
    checkpoint.tidy(run, keep_last=1)
    assert sorted((run / "checkpoints").iterdir()) == [link, kept]


def test_of_the_tokenizer_its_own_files_are_taken_and_must_have_checksums(tmp_path, tokenizer_dir):
    (tokenizer_dir / ".ipynb_checkpoints").mkdir()
    (tokenizer_dir / "notes.txt").write_text("of the user")
    target, *_ = write(tmp_path / "run", 5, tokenizer_dir)
    assert [path.name for path in (target / "tokenizer").iterdir()] == ["vocab.txt"]
    (target / "notes.txt").write_text("of the user")
    checkpoint.verify(target)
    (target / "tokenizer" / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(FastElectraError, match=r"SHA256SUMS lacks tokenizer/tokenizer\.json"):
        checkpoint.verify(target)


def test_tensors_are_mapped_not_copied(tmp_path, tokenizer_dir):
    """Memory that is the process's own stays free; ranks of a machine share what the disk holds."""

    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) >> 10

    target, weights, _ = write(tmp_path / "run", 5, tokenizer_dir, size=32 << 20)
    del weights
    before = own()
    weights = checkpoint.read_weights(target)
    assert weights["a.weight"].sum() > 0  # all of its 128 MiB are read
    assert own() < before + 32


def test_a_failed_write_leaves_nothing(tmp_path, tokenizer_dir):
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # stands in for a full disk
    try:
        with pytest.raises((FastElectraError, OSError)) as caught:
            write(run, 5, tokenizer_dir, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list((run / "checkpoints").iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    target = tmp_path / "export"
    target.mkdir()
    (target / "precious").write_text("x")
    with (
        pytest.raises(FastElectraError, match="already exists"),
        checkpoint.write_folder(target),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_damage_is_one_clear_line(tmp_path, tokenizer_dir):
    target, *_ = write(tmp_path / "run", 5, tokenizer_dir)
    (target / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(FastElectraError, match=r"cannot read .*model\.safetensors"):
        checkpoint.read_weights(target)
    state = json.loads((target / "state.json").read_text())
    (target / "state.json").write_text(json.dumps({**state, "format": 2}))
    with pytest.raises(FastElectraError, match="format 2"):
        checkpoint.read_state(target)
    (target / "state.json").write_text("{")
    with pytest.raises(FastElectraError, match="cannot read the checkpoint"):
        checkpoint.read_state(target)
