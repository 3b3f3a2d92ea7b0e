"""Input files to documents."""

from collections.abc import Iterator
from pathlib import Path


def read_documents(files: list[Path]) -> Iterator[list[str]]:
    """Documents of .txt files: their lines, a blank line between two."""
    for path in files:
        lines: list[str] = []
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line := line.strip():
                    lines.append(line)
                elif lines:
                    yield lines
                    lines = []
        if lines:
            yield lines
