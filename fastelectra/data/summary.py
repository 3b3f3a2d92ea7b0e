"""What `prepare` says of a corpus it has made, and what it warns of."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastelectra.data import vocabulary
from fastelectra.data.shards import Manifest
from fastelectra.data.sources import SKIPPED, Skipped

MOST_UNKNOWN = 0.05  # of the tokens, before a warning
MOST_HARMED = 0.01  # of the characters, likewise


def lines(
    out: Path, manifest: Manifest, skipped: Skipped, other_kinds: Counter[str]
) -> Iterator[str]:
    """Counts, what is left out, and warnings of what training would do badly with."""
    counts = manifest.counts
    heldout = [shard for shard in manifest.shards if shard.split == "heldout"]
    unknown = counts["unknown"] / counts["tokens"]
    yield (
        f"{out}: {counts['documents']:,} documents"
        f" ({sum(shard.documents for shard in heldout):,} held out), {counts['tokens']:,} tokens"
        f" ({unknown:.2%} unknown), vocabulary {manifest.vocab_size:,}"
    )
    if skipped:
        reasons = ", ".join(f"{count:,} × {why}" for why, count in skipped.by_reason().items())
        yield f"skipped: {reasons}; listed in {out / SKIPPED}"
    if other_kinds:
        endings = [ending for ending, _ in other_kinds.most_common()]
        named = ", ".join(endings[:5]) + ", …" * (len(endings) > 5)
        files = f"{other_kinds.total():,} file{'s' * (other_kinds.total() > 1)}"
        yield f"left out: {files} of other kinds ({named})"
    if unknown > MOST_UNKNOWN:
        yield (
            f"warning: {unknown:.0%} of the tokens are [UNK]: is the vocabulary, given or trained,"
            " of this language and case, and large enough?"
        )
    if not any(shard.tokens for shard in heldout):
        advice = "give --heldout-fraction above 0"
        if manifest.settings["heldout_fraction"]:
            advice = (
                "give more documents, or separate those of a .txt by blank lines or with"
                " --one-document-per-line"
            )
        yield f"warning: no text is held out, which training evaluates on: {advice}"


def harm(characters: Counter[str]) -> Iterator[str]:
    """A warning, if the removal of accents takes parts of many of these letters."""
    harmed = vocabulary.harmed_letters(characters)
    share = harmed.total() / max(1, characters.total())
    if share > MOST_HARMED:
        names = (unicodedata.name(letter, "?") for letter, _ in harmed.most_common(2))
        yield (
            f"warning: the removal of accents changes {share:.0%} of the characters, such as"
            f" {' and '.join(names)}: prepare again with --keep-accents"
        )
