"""Real sentences, texts made of them, the command that prepares a text, and what it leaves."""

import random
from pathlib import Path

from fastelectra import cli, errors

SENTENCES = """\
The chef cooked the meal and the guests praised him for it.
It was the best of times, it was the worst of times, it was the age of wisdom.
Call me Ishmael; some years ago, never mind how long precisely, I went to sea.
All happy families are alike; every unhappy family is unhappy in its own way.
A café in Zürich sells crème brûlée, naïve tourists say, for 12.50 francs.
The quick brown fox jumps over the lazy dog, whose name is "Rover".
In 1905 Einstein published four papers; E = mc² came out of the last one.
東京 is the capital of 日本, and Москва that of Россия.
She said: "Don't you think (honestly!) that 50% is enough?"
The temperature fell to −40 °C, which is −40 °F as well.
Ships at a distance have every man's wish on board.
Many years later he was to remember that distant afternoon when his father took him along.
The sky above the port was the color of television, tuned to a dead channel.
Electrons repel each other; the discriminator tells the real words from the replaced ones.
A language model learns which words go together, and in which order they come.
Not all those who wander are lost 😀, and not all that glitters is gold.
We hold these truths to be self-evident, that all men are created equal.
The unexamined life is not worth living.
Whether I shall turn out to be the hero of my own life, these pages must show.
Happiness can be found even in the darkest of times, if one only remembers to turn on the light.
""".splitlines()


def make_text(documents: int, seed: int = 0) -> str:
    """Documents of 1 to 12 lines, a line being 1 to 8 of the sentences."""
    chance = random.Random(seed)
    return "\n\n".join(
        "\n".join(
            " ".join(chance.choices(SENTENCES, k=chance.randint(1, 8)))
            for _ in range(chance.randint(1, 12))
        )
        for _ in range(documents)
    )


def prepare(*arguments) -> int:
    """`fastelectra prepare`, in this process; the exit code."""
    return errors.run(cli.main, ["prepare", *map(str, arguments)])


def files(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def children(parent: int, word: str) -> list[int]:
    """Processes below `parent` whose command line has the word."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            above = int(status.read_text().rpartition(")")[2].split()[1])
            if above == parent and word in status.with_name("cmdline").read_text():
                found.append(int(status.parent.name))
        except (OSError, IndexError):
            continue  # it has just ended
    return found
