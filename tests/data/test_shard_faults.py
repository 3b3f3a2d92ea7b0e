"""What may happen to `prepare`: kills, dying workers, a full disk, hostile input; at any moment."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from texts import SENTENCES, children, files, make_text, prepare

from fastelectra.data import encoding, sources
from fastelectra.data.encoding import Piece, encode_in_order
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError

KILLS = int(os.environ.get("FASTELECTRA_KILLS", "3"))

SMALL_PIECES = (  # many chunks, flushes and shards from little text
    "import sys; from fastelectra import cli, errors\n"
    "from fastelectra.data import encoding, prepare, writer\n"
    "if __name__ == '__main__':\n"
    "    prepare.WORKER_BYTES, prepare.SHARD_BYTES = 1, 200_000\n"
    "    encoding.CHUNK_CHARACTERS, writer.BUFFER_BYTES = 20_000, 30_000\n"
    "    sys.exit(errors.run(cli.main, sys.argv[1:]))\n"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """`fastelectra` with small pieces."""
    file = tmp_path_factory.mktemp("program") / "program.py"
    file.write_text(SMALL_PIECES)
    return file


def command(program, inputs, out, workers=2) -> list[str]:
    arguments = [sys.executable, program, "prepare", inputs, "--out", out, "--vocab-size", 300,
                 "--workers", workers]  # fmt: skip
    return [str(argument) for argument in arguments]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Sound text, and text with something to skip."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "a.txt").write_text(make_text(400, 1), encoding="utf-8")
    bad = make_text(200, 2).encode().replace("café".encode(), b"caf\xe9")
    (folder / "b.txt.gz").write_bytes(gzip.compress(bad))
    (folder / "c.txt").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(program, inputs, tmp_path_factory):
    """What comes out when nothing happens, and the seconds it takes."""
    out, start = tmp_path_factory.mktemp("whole") / "out", time.monotonic()
    subprocess.run(command(program, inputs, out), check=True)
    result = files(out)
    assert b"not UTF-8" in result["skipped.jsonl"]
    return result, time.monotonic() - start


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(program, inputs, whole, tmp_path):
    expected, seconds = whole
    chance, kills, finished = random.Random(5), 0, 0
    while kills < KILLS:
        out = tmp_path / f"out{finished}"
        run = command(program, inputs, out, workers=1 + kills % 2)
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds * chance.uniform(0.1, 1))
            finished += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        assert not out.exists() or files(out) == expected  # absent or complete
    subprocess.run(command(program, inputs, out), check=True)
    assert files(out) == expected
    print(f"\nsurvived {kills} kills, {finished + 1} times whole")


def test_a_worker_that_is_killed_at_any_time_is_replaced(program, inputs, whole, tmp_path):
    expected, seconds = whole
    chance, kills = random.Random(6), 0
    while kills < KILLS // 3:
        out = tmp_path / f"out{time.monotonic()}"
        process = subprocess.Popen(command(program, inputs, out), stderr=subprocess.PIPE, text=True)
        time.sleep(seconds * chance.uniform(0.2, 1))
        workers = children(process.pid, "spawn_main")
        for worker in workers[:1]:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert files(out) == expected
        kills += "a worker process died: another one goes on" in errors
    print(f"\nreplaced {kills} workers")


def kill_yourself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_sending(pipe, *_):
    pipe.recv()
    os.write(pipe.fileno(), struct.pack("!i", 1000) + b"half a message")
    kill_yourself()


@pytest.mark.parametrize("death", [kill_yourself, die_while_sending])
def test_workers_that_keep_dying_end_in_one_message(death, corpus, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "_work", death)
    chunks = [[Piece(0, ["a " * 500_000], True, True)]] * 9
    with pytest.raises(FastElectraError, match="worker processes keep dying"):
        list(encode_in_order(chunks, corpus.tokenizer_dir, np.dtype("<u2"), 2))
    assert capsys.readouterr().err.count("a worker process died") >= encoding.MOST_DEATHS


def test_a_worker_may_be_stopped_while_it_is_replaced(corpus, monkeypatch):
    """By an error in the work of another."""
    monkeypatch.setattr(encoding, "_work", kill_yourself)
    process = multiprocessing.get_context("spawn").Process
    starting, start = threading.Event(), process.start

    def slow_start(self):
        starting.set()
        time.sleep(0.3)
        start(self)

    worker = encoding._Worker(corpus.tokenizer_dir, np.dtype("<u2"))
    monkeypatch.setattr(process, "start", slow_start)
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(worker.encode, [Piece(0, ["a"], True, True)])
        assert starting.wait(60)
        worker.stop()
        assert isinstance(work.exception(60), (EOFError, OSError))
    assert not worker._process.is_alive()


def test_a_worker_that_cannot_be_replaced_is_one_error(corpus, monkeypatch):
    monkeypatch.setattr(encoding, "_work", kill_yourself)
    process = multiprocessing.get_context("spawn").Process
    start, started = process.start, []

    def few_starts(self):
        if len(started) == 2:
            raise BlockingIOError("Resource temporarily unavailable")
        started.append(self)
        start(self)

    monkeypatch.setattr(process, "start", few_starts)
    chunks = [[Piece(0, ["a"], True, True)]] * 9
    with pytest.raises(BlockingIOError):
        list(encode_in_order(chunks, corpus.tokenizer_dir, np.dtype("<u2"), 2))
    assert not any(one.is_alive() for one in started)


@pytest.mark.parametrize("kilobytes", [16, 120, 400])
def test_a_full_disk(kilobytes, program, inputs, tmp_path):
    """A small tmpfs; what is there already stays, and nothing is there that looks whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={kilobytes}k"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs to mount a file system")
    try:
        run = command(program, inputs, disk / "out", workers=1)
        result = subprocess.run(run, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line == f"error: {disk / 'out'}: No space left on device"
        assert os.listdir(disk) == []
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert subprocess.run(run, check=False).returncode == 0  # once there is room
        open_corpus(disk / "out").verify()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def prepared(folder, *more):
    """The corpus made of a folder, and what its skipped.jsonl lists."""
    assert prepare(folder, *more, "--out", folder / "out", "--vocab-size", 300) == 0
    listed = (folder / "out/skipped.jsonl").read_text().splitlines()
    return open_corpus(folder / "out"), list(map(json.loads, listed))


def test_copies_links_and_empty_files_are_used_once_and_listed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(make_text(20), encoding="utf-8")
    (tmp_path / "b.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    (tmp_path / "c.txt").hardlink_to(tmp_path / "a.txt")
    (tmp_path / "d.txt").symlink_to(tmp_path / "a.txt")  # the same file, not a copy
    (tmp_path / "e.txt").touch()
    corpus, skipped = prepared(tmp_path, tmp_path / "*.txt")
    assert corpus.manifest.counts["documents"] == 20
    assert corpus.manifest.counts["skipped"] == 3
    copy = {"reason": "a copy of another file", "count": 1, "first": "a.txt"}
    assert skipped == [
        {"file": "b.txt", **copy}, {"file": "c.txt", **copy},
        {"file": "e.txt", "reason": "empty", "count": 1},
    ]  # fmt: skip
    summary = "skipped: 2 × a copy of another file, 1 × empty; listed in"
    assert summary in capsys.readouterr().err


def test_files_of_other_kinds_are_counted(tmp_path, capsys):
    """But not what `prepare` made."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.json", "b.json.gz", "c.MD", "d.md", "Makefile", "log.1", "e.\x1b[1m"):
        (folder / name).write_text(make_text(2), encoding="utf-8")
    line = "left out: 7 files of other kinds (no ending, .md, .json, .json.gz)\n"
    prepared(tmp_path)
    assert line in capsys.readouterr().err
    out = ("--out", tmp_path / "again", "--vocab-size", 300)
    assert prepare(folder / "*", *out) == 0
    assert line in capsys.readouterr().err


def test_bad_bytes_cost_their_line_only(tmp_path):
    """The corpus is what it would be without these lines, NULs and carriage returns."""
    good = make_text(40)
    lines = good.encode().split(b"\n")
    for number in range(0, len(lines), 7):
        lines[number] = b"\xff broken \xc3\n" + lines[number].replace(b" ", b"\0 ", 1)
    for name, content in (("good", good.encode()), ("bad", b"\r\n".join(lines))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(content)
    good_corpus, _ = prepared(tmp_path / "good")
    bad_corpus, skipped = prepared(tmp_path / "bad")
    assert [entry.sha256 for entry in bad_corpus.manifest.shards] == [
        entry.sha256 for entry in good_corpus.manifest.shards
    ]
    (record,) = skipped
    assert record["count"] == -(-len(good.split("\n")) // 7)
    assert (record["reason"], record["first"]) == ("line is not UTF-8", "byte 0")


WORD = b"x" * 99 + b" "


def hard_parquet() -> bytes:
    """Pages, rows and repeated values near the limits, and a row group beyond them."""
    sink = pyarrow.BufferOutputStream()
    groups = [[n * WORD.decode()] * m for n, m in ((660_000, 1), (300_000, 4), (1_000_000, 2))]
    tables = [pyarrow.table({"text": texts}) for texts in groups]
    with pyarrow.parquet.ParquetWriter(sink, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


LARGE = {  # name: content, documents, tokens
    "line.txt": (lambda: WORD * 1_000_000, 1, 1_000_000),
    "line.jsonl": (lambda: '{"text": "😀 '.encode() + WORD * 335_000 + b'"}', 1, 335_001),
    "tiny.txt": (lambda: b"a\n\n" * 1_000_000, 1_000_000, 1_000_000),
    "hard.parquet": (hard_parquet, 4, 1_200_000),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_input_in_bounded_memory(name, tmp_path):
    content, documents, tokens = LARGE[name]
    (tmp_path / name).write_bytes(content())
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    program = (
        "import re, sys; from fastelectra import cli; cli.main(sys.argv[1:])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    run = [sys.executable, "-c", program, "prepare", tmp_path / name, "--out", tmp_path / "out",
           "--vocab", tmp_path / "vocab.txt", "--workers", "1"]  # fmt: skip
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    counts = open_corpus(tmp_path / "out").manifest.counts
    assert (counts["documents"], counts["tokens"]) == (documents, tokens)
    print(f"\n{name}: peak {int(result.stdout) / 1e3:.0f} MB")
    assert int(result.stdout) < 800_000


def test_a_full_temporary_folder_ends_in_one_message(tmp_path, monkeypatch, capsys):
    """Where lists of files are kept."""
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    database = sources._database

    def small(table):
        made = database(table)
        made.execute("PRAGMA max_page_count = 4")
        return made

    monkeypatch.setattr(sources, "_database", small)
    assert prepare(tmp_path, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: lists of input files, which are kept in TMPDIR, else /var/tmp: ")
    assert "full" in line


def test_a_folder_that_changes_meanwhile(tmp_path):
    """A file vanishes and another grows after they have been listed."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} {SENTENCES[0]}\n\n" * 3)
    program = (
        "import sys; from pathlib import Path; from fastelectra import cli\n"
        "from fastelectra.data import prepare\n"
        "folder, make = Path(sys.argv[2]), prepare.ShardWriter\n"
        "def meanwhile(*arguments):\n"
        "    (folder / 'b.txt').unlink()\n"
        "    (folder / 'c.txt').write_text((folder / 'c.txt').read_text() + 'more')\n"
        "    return make(*arguments)\n"
        "prepare.ShardWriter = meanwhile\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    run = [sys.executable, "-c", program, "prepare", tmp_path, "--out", tmp_path / "out",
           "--vocab-size", "60"]  # fmt: skip
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert open_corpus(tmp_path / "out").manifest.counts["documents"] == 7
    listed = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    assert {record["file"]: record["reason"] for record in listed} == {
        "b.txt": "No such file or directory",
        "c.txt": "changed while it was read",
    }
