"""What the benchmarks' command lines share. Imports nothing heavy."""

from pathlib import Path

from fastelectra.errors import FastElectraError

ROOT = Path(__file__).resolve().parent.parent


def check_outputs(*files: Path | None, picture: Path | None = None) -> None:
    """Make the folders of what will be written; None: nothing.

    Raises FastElectraError or OSError, before anything is measured, for what could not be.
    """
    if picture:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise FastElectraError(f"{picture}: a picture needs matplotlib") from None
        kinds = Figure().canvas.get_supported_filetypes()
        if picture.suffix[1:].lower() not in kinds:
            raise FastElectraError(f"{picture}: the name should end in one of .{', .'.join(kinds)}")
    for file in filter(None, (*files, picture)):
        file.parent.mkdir(parents=True, exist_ok=True)
        there = file.exists()
        file.open("a").close()
        if not there:
            file.unlink(missing_ok=True)
