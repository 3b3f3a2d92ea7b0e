"""The command: its files, that they never depend on how it ran, and its refusals."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from texts import children, files, make_text, prepare
from tokenizers import Tokenizer

from fastelectra.data import encoding, writer
from fastelectra.data.shards import open_corpus
from fastelectra.errors import FastElectraError

SMALL = ("--vocab-size", 300)


def refusal(capsys, *arguments) -> str:
    """The one line that prepare prints when it exits with 2."""
    capsys.readouterr()
    assert prepare(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def decoded(shard, tokenizer) -> list[str]:
    """The documents of a shard, a line of text each."""
    documents, position, ids = [], 0, []
    for length in shard.lines.tolist():
        ids += shard.tokens[position : position + length].tolist()
        position += length
        if length == 0:
            documents.append(tokenizer.decode(ids))
            ids = []
    assert position == len(shard.tokens)
    assert not ids
    return documents


class TestResult:
    def test_every_document_is_in_exactly_one_shard(self, sharded_corpus, text_file):
        tokenizer = Tokenizer.from_file(str(sharded_corpus.tokenizer_dir / "tokenizer.json"))
        shards = {name: sharded_corpus.split(name) for name in ("train", "heldout")}
        found = {
            name: [text for shard in shards[name] for text in decoded(shard, tokenizer)]
            for name in shards
        }
        texts = text_file.read_text(encoding="utf-8").split("\n\n")
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert Counter(found["train"] + found["heldout"]) == Counter(map(tokenizer.decode, encoded))
        assert 30 <= len(found["heldout"]) <= 90  # of 300, a fifth
        sizes = [len(shard.tokens) for shard in shards["train"]]
        assert max(sizes) < 2.5 * min(sizes)

    def test_lines_are_the_lines_of_the_text(self, corpus, text_file):
        tokenizer = Tokenizer.from_file(str(corpus.tokenizer_dir / "tokenizer.json"))
        first = text_file.read_text(encoding="utf-8").partition("\n\n")[0].split("\n")
        lengths = [len(tokenizer.encode(line, add_special_tokens=False).ids) for line in first]
        (shard,) = corpus.split("train")
        assert shard.lines[: len(first) + 1].tolist() == [*lengths, 0]

    def test_the_manifest_counts(self, corpus):
        shards = corpus.split("train") + corpus.split("heldout")
        assert corpus.manifest.counts == {
            "documents": 300,
            "tokens": sum(len(shard.tokens) for shard in shards),
            "unknown": 0,
            "skipped": 0,
        }
        assert corpus.vocab_size == 500
        assert (corpus.special.pad, corpus.special.mask) == (0, 4)
        assert all(shard.tokens.dtype == np.uint16 for shard in shards)
        corpus.verify()

    def test_copies_of_a_document_are_held_out_together(self, tmp_path):
        texts = make_text(60).split("\n\n")
        (tmp_path / "a.txt").write_text("\n\n".join(texts * 2), encoding="utf-8")
        out = tmp_path / "out"
        assert prepare(tmp_path / "a.txt", "--out", out, "--heldout-fraction", 0.4, *SMALL) == 0
        corpus = open_corpus(out)
        tokenizer = Tokenizer.from_file(str(corpus.tokenizer_dir / "tokenizer.json"))
        train, heldout = (
            Counter(decoded(corpus.split(name)[0], tokenizer)) for name in ("train", "heldout")
        )
        assert len(set(train) & set(heldout)) <= 2  # the first two documents are placed by number

    def test_nothing_is_held_out_when_nothing_is_asked_for(self, text_file, tmp_path, capsys):
        out = tmp_path / "out"
        assert prepare(text_file, "--out", out, "--heldout-fraction", 0, *SMALL) == 0
        advice = "no text is held out, which training evaluates on: give --heldout-fraction above 0"
        assert advice in capsys.readouterr().err
        with pytest.raises(FastElectraError, match="no text in its heldout split"):
            open_corpus(out).split("heldout")
        assert open_corpus(out).manifest.counts["documents"] == 300


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three files of three kinds, with documents longer than a (small) chunk."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "a.txt").write_text(make_text(80, 1), encoding="utf-8")
    long = make_text(80, 2).replace("\n\n", "\n")
    (folder / "b.txt.gz").write_bytes(gzip.compress(long.encode()))
    records = (json.dumps({"text": text}) for text in make_text(80, 3).split("\n\n"))
    (folder / "c.jsonl").write_text("\n".join(records))
    return folder


@pytest.fixture(scope="module")
def small_pieces():
    """Many shards, chunks and flushes from little text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastelectra.data.prepare.SHARD_BYTES", 100_000)
        patch.setattr("fastelectra.data.prepare.WORKER_BYTES", 1)
        patch.setattr(encoding, "CHUNK_CHARACTERS", 20_000)
        patch.setattr(writer, "BUFFER_BYTES", 30_000)
        yield


@pytest.fixture(scope="module")
def expected(inputs, small_pieces, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    assert prepare(inputs, "--out", out, "--workers", 1, *SMALL) == 0
    return files(out)


@pytest.mark.usefixtures("small_pieces")
class TestReproducible:
    def test_the_number_of_workers_does_not_matter(self, inputs, expected, tmp_path):
        assert sum(name.startswith("train") for name in expected) >= 6
        assert prepare(inputs, "--out", tmp_path / "out", "--workers", 3, *SMALL) == 0
        assert files(tmp_path / "out") == expected

    def test_an_interrupted_run_goes_on_where_it_was(
        self, inputs, expected, tmp_path, monkeypatch, capsys
    ):
        out, add, encoded = tmp_path / "out", writer.ShardWriter.add, []

        def interrupt(self, chunk):
            if self.chunks == 15:
                raise KeyboardInterrupt
            add(self, chunk)

        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "add", interrupt)
            assert prepare(inputs, "--out", out, "--workers", 1, *SMALL) == 130
        assert "the same command goes on" in capsys.readouterr().err
        assert not out.exists()
        call = encoding.Encoder.__call__
        monkeypatch.setattr(
            encoding.Encoder, "__call__", lambda self, chunk: encoded.append(1) or call(self, chunk)
        )
        assert prepare(inputs, "--out", out, "--workers", 1, *SMALL) == 0
        assert files(out) == expected
        whole = len(list(encoding.make_chunks(iter(make_lines(inputs)), lambda *_: 0)))
        assert 0 < len(encoded) < whole

    @pytest.mark.parametrize("damage", ["train-00001.tokens", "progress.json"])
    def test_a_damaged_interrupted_run_begins_anew(
        self, damage, inputs, expected, tmp_path, monkeypatch
    ):
        """As after a power cut: a file shorter than was promised."""
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "finish", raise_interrupt)
            assert prepare(inputs, "--out", out, "--workers", 1, *SMALL) == 130
        file = tmp_path / "out.partial" / damage
        file.write_bytes(file.read_bytes()[:-1])
        assert prepare(inputs, "--out", out, "--workers", 1, *SMALL) == 0
        assert files(out) == expected

    def test_other_settings_do_not_go_on_with_an_interrupted_run(
        self, inputs, expected, tmp_path, monkeypatch
    ):
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "finish", raise_interrupt)
            assert prepare(inputs, "--out", out, "--workers", 1, "--vocab-size", 350) == 130
        assert prepare(inputs, "--out", out, "--workers", 1, *SMALL) == 0
        assert files(out) == expected

    def test_the_same_file_given_twice_is_used_once(self, inputs, expected, tmp_path):
        out = tmp_path / "out"
        assert prepare(inputs / "a.txt", inputs, inputs / "c.jsonl", "--out", out, *SMALL) == 0
        assert files(out) == expected

    def test_running_again_does_nothing(self, inputs, expected, tmp_path, capsys):
        out = tmp_path / "out"
        assert prepare(inputs, "--out", out, *SMALL) == 0
        times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        capsys.readouterr()
        assert prepare(inputs, "--out", out, *SMALL) == 0
        assert "prepared already" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


def make_lines(inputs):
    from fastelectra.data.reader import Reader
    from fastelectra.data.sources import Skipped, find_sources

    return Reader(find_sources([str(inputs)]), "blank-line", "text", Skipped())


def raise_interrupt(*_):
    raise KeyboardInterrupt


class TestKilled:
    def test_workers_die_with_their_parent_and_the_run_goes_on(self, tmp_path):
        (tmp_path / "a.txt").write_text(make_text(1600), encoding="utf-8")
        program = (
            "import sys; from fastelectra import cli; from fastelectra.data import prepare\n"
            "if __name__ == '__main__':\n"
            "    prepare.WORKER_BYTES = 1\n"
            "    sys.exit(cli.main(sys.argv[1:]))\n"
        )
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, tmp_path / "program.py", "prepare", tmp_path / "a.txt", "--out",
                   tmp_path / "out", "--vocab-size", "300", "--workers", "2"]  # fmt: skip
        process = subprocess.Popen(command)
        workers: list[int] = []
        while len(workers) < 2 and process.poll() is None:
            workers = children(process.pid, "spawn_main")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(workers) == 2
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not (tmp_path / "out").exists()
        assert subprocess.run(command, check=False).returncode == 0
        open_corpus(tmp_path / "out").verify()


class TestRefusals:
    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text(make_text(10), encoding="utf-8")
        return path

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "empty"), (b" \n\n\t\n", "no words"), (b"caf\xe9", "no words.*not UTF-8")],
    )
    def test_text_that_cannot_be_used(self, content, message, tmp_path, capsys):
        (tmp_path / "a.txt").write_bytes(content)
        line = refusal(capsys, tmp_path / "a.txt", "--out", tmp_path / "out", *SMALL)
        assert re.search(message, line)
        assert str(tmp_path / "a.txt") in line or message == "no words"
        assert os.listdir(tmp_path) == ["a.txt"]

    def test_text_without_tokens_for_a_given_vocabulary(self, tmp_path, capsys):
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
        (tmp_path / "a.txt").write_text("\u200b\n")
        line = refusal(capsys, tmp_path / "a.txt", "--out", tmp_path / "out",
                       "--vocab", tmp_path / "vocab.txt")  # fmt: skip
        assert "no text" in line
        assert sorted(os.listdir(tmp_path)) == ["a.txt", "vocab.txt"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{text}"], "--out DIR is missing"),
            (["--out", "{out}"], "give INPUT"),
            (["{text}", "--demo", "--out", "{out}"], "leave out INPUT"),
            (["{text}", "--out", "{out}", "--heldout-fraction", "1"], "--heldout-fraction 1.0"),
            (["{text}", "--out", "{out}", "--workers", "0"], "--workers 0"),
            (["{text}", "--out", "{out}", "--vocab-size", "0"], "--vocab-size 0: must be"),
            (["{text}", "--out", "{out}", "--vocab-size", "9" * 30], "must be in [1,"),
            (["{text}", "--out", "{out}", "--vocab-size", "9"], "--vocab-size 9 is too small"),
            (["{text}", "--out", "{out}", "--vocab", "{text}.no"], "no such file"),
            (["{text}", "--out", "{out}", "--vocab", "{text}"], "lacks [PAD]"),
            (["{text}", "--out", "{out}", "--vocab", "{folder}"], "has no tokenizer: expected"),
            (["{text}.no", "--out", "{out}"], "no such file or folder"),
            (["{text}", "--out", "{text}/out"], "Not a directory"),
            (["{text}", "--out", "{text}"], "choose another --out"),
            (["{text}", "--out", "/proc/out"], "/proc/out"),
            (["{text}", "--out", "/proc"], "/proc is a mount point"),
            (["{text}", "--out", "."], "choose a folder in it"),
        ],
    )
    def test_arguments(self, arguments, message, text, capsys):
        places = {"text": text, "out": text.parent / "out", "folder": text.parent}
        line = refusal(capsys, *(argument.format(**places) for argument in arguments))
        assert message in line
        assert os.listdir(text.parent) == ["a.txt"]

    def test_other_settings_or_input_in_the_same_place(self, text, tmp_path, capsys):
        out = tmp_path / "out"
        assert prepare(text, "--out", out, *SMALL) == 0
        before = files(out)
        assert "(vocabulary)" in refusal(capsys, text, "--out", out, "--vocab-size", 301)
        content = text.read_bytes()
        text.write_bytes(content[:-1] + b"!")  # same name, same size
        assert "(inputs)" in refusal(capsys, text, "--out", out, *SMALL)
        assert files(out) == before

    def test_a_folder_with_other_things_is_left_alone(self, text, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("x")
        assert "not a prepared corpus" in refusal(capsys, text, "--out", tmp_path / "out", *SMALL)
        assert os.listdir(tmp_path / "out") == ["thesis.tex"]

    def test_so_is_one_where_it_would_work(self, text, tmp_path, capsys):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial/thesis.tex").write_text("x")
        line = refusal(capsys, text, "--out", tmp_path / "out", *SMALL)
        assert "out.partial, where `prepare` would work, has other files" in line
        assert os.listdir(tmp_path / "out.partial") == ["thesis.tex"]

    def test_a_single_document_is_not_held_out(self, tmp_path, capsys):
        (tmp_path / "a.txt").write_text("The chef cooked the meal.\nIt was good.")
        assert prepare(tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab-size", 60) == 0
        assert "no text is held out" in (warning := capsys.readouterr().err)
        assert "blank lines or with --one-document-per-line" in warning
        assert len(open_corpus(tmp_path / "out").split("train")) == 1

    def test_an_empty_folder_is_used(self, text, tmp_path):
        (tmp_path / "out").mkdir()
        assert prepare(text, "--out", tmp_path / "out", *SMALL) == 0
        open_corpus(tmp_path / "out")

    def test_a_home_folder_that_the_shell_did_not_name(self, text, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert prepare("~/a.txt", "--out=~/out", *SMALL) == 0
        vocab = "--vocab=~/out/tokenizer/vocab.txt"
        assert prepare("~/*.txt", "--out=~/again", vocab) == 0
        open_corpus(tmp_path / "again")

    def test_a_link_to_an_empty_folder_is_followed(self, text, tmp_path):
        (tmp_path / "there").mkdir()
        (tmp_path / "link").symlink_to("there")
        assert prepare(text, "--out", tmp_path / "link", *SMALL) == 0
        open_corpus(tmp_path / "there")

    def test_a_file_name_need_not_be_utf8(self, text, tmp_path):
        text.rename(tmp_path / os.fsdecode(b"caf\xe9.txt"))
        for _ in range(2):  # the second time it is recognised
            assert prepare(tmp_path / "*.txt", "--out", tmp_path / "out", *SMALL) == 0

    def test_two_at_the_same_time(self, text, tmp_path, capsys, monkeypatch):
        from fastelectra.data import prepare as module

        inner = []

        def meanwhile(*_):
            inner.append(refusal(capsys, text, "--out", tmp_path / "out", *SMALL))
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "_prepare", meanwhile)
            prepare(text, "--out", tmp_path / "out", *SMALL)
        assert "another `prepare` is at work" in inner[0]

    @pytest.mark.parametrize("limit", [10, 3_000, 60_000], ids=["settings", "tokenizer", "tokens"])
    def test_a_full_disk_leaves_nothing(self, limit, tmp_path):
        """A limit on the size of files stands in for the disk: writing fails the same way."""
        text = tmp_path / "a.txt"
        text.write_text(make_text(100), encoding="utf-8")
        command = [sys.executable, "-m", "fastelectra.cli", "prepare", str(text), "--out",
                   str(tmp_path / "out"), "--vocab-size", "300"]  # fmt: skip
        result = subprocess.run(
            command, capture_output=True, text=True, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert f"{tmp_path / 'out'}: File too large" in result.stderr
        assert os.listdir(tmp_path) == ["a.txt"]
