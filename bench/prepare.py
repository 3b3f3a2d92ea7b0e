"""`fastelectra prepare` beside `tokenizers` alone, over the same text on the same cores.

    python bench/prepare.py TEXT… --vocab vocab.txt [--repeats 5] [--out results.json]

Alternately: the whole command, from its start to a finished corpus; and nothing but
`encode_batch_fast` of the library, its threads on all the cores, over lines that are in memory
already. Machines are rarely quiet, so the ratio of each pair counts, and of those the median.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from measure import provenance, quartiles

from fastelectra.data import vocabulary
from fastelectra.data.reader import Reader
from fastelectra.data.sources import Skipped, find_sources

BLOCK = 1 << 20  # characters handed to the library at a time, as prepare does
INTERVAL = 0.05  # seconds between two looks at the memory


def main() -> None:
    """Measure; print a line a pair, and the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help="as the INPUT of `fastelectra prepare`")
    add("--vocab", required=True, metavar="FILE", help="vocab.txt or tokenizer.json")
    add("--repeats", type=int, default=5, metavar="N")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    add("--out", metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # of the library
    found = find_sources(args.texts)
    size = sum(source.text_bytes for source in found)
    lines = [line for line in Reader(found, "blank-line", "text", Skipped()) if line]
    pairs = []
    for _ in range(args.repeats):
        pair = {"tokenizers_s": library(lines, args.vocab), **command(args)}
        pair["ratio"] = pair["tokenizers_s"] / pair["prepare_s"]
        pairs.append(pair)
        print(
            f"tokenizers {size / pair['tokenizers_s'] / 1e6:6.1f} MB/s · prepare"
            f" {size / pair['prepare_s'] / 1e6:6.1f} MB/s · ratio {pair['ratio']:.2f} · peak"
            f" {pair['peak_bytes'] / 1e6:.0f} MB · load {pair['load']:.1f}",
            flush=True,
        )
    result = {
        "provenance": provenance(), "text_bytes": size, "workers": args.workers, "pairs": pairs,
        "ratio": quartiles([pair["ratio"] for pair in pairs]),
        "peak_bytes": max(pair["peak_bytes"] for pair in pairs),
    }  # fmt: skip
    low, median, high = (result["ratio"][name] for name in ("low", "median", "high"))
    print(f"prepare is {median:.2f} × tokenizers alone (quartiles {low:.2f}–{high:.2f})")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


def library(lines: list[str], vocab: str) -> float:
    """Seconds of the library's own encoding."""
    tokenizer = vocabulary.read(Path(vocab), lowercase=True, strip_accents=True)
    blocks, size = [[]], 0
    for line in lines:
        blocks[-1].append(line)
        size += len(line)
        if size >= BLOCK:
            blocks.append([])
            size = 0
    start = time.perf_counter()
    for block in blocks:
        for encoding in tokenizer.encode_batch_fast(block, add_special_tokens=False):
            encoding.ids  # noqa: B018  (it is what one wants of it)
    return time.perf_counter() - start


def command(args: argparse.Namespace) -> dict:
    """Seconds of the whole command, and the peak of the memory of all its processes."""
    folder = Path(tempfile.mkdtemp())
    run = [sys.executable, "-m", "fastelectra.cli", "prepare", *args.texts, "--out", folder / "out",
           "--vocab", args.vocab, "--workers", str(args.workers)]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(run, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(memory(pid) for pid in family(process.pid)))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    return {"prepare_s": seconds, "peak_bytes": peak, "load": os.getloadavg()[0]}


def family(pid: int | str) -> list[int | str]:
    """A process and all below it."""
    found = [pid]
    with suppress(OSError):  # it has ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [below for child in children.read_text().split() for below in family(child)]
    return found


def memory(pid: int | str) -> int:
    """Bytes of a process, what it shares with others divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
