"""The one error type a user sees: a line that says what is wrong, where, and what to do."""

import os
import sys


class FastElectraError(Exception):
    """A mistake or condition a user can mend. Printed as one line; the process exits with 2."""


def run(main, argv=None) -> int:
    """Run `main(argv)`; report a FastElectraError, an OS error or Ctrl-C without a traceback.

    Returns the exit code: 0 success, 2 an error the user can mend, 130 interrupted, 141 where what
    reads the output has gone, as `head` does.
    """
    if hasattr(sys.stdout, "reconfigure"):  # it may be closed, or another kind of stream
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without × or ▁ ends nothing
    try:
        code = main(argv) or 0
        if sys.stdout:
            sys.stdout.flush()
        return code
    except FastElectraError as error:
        message = str(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except OSError as error:  # no permission, full disk, a path that is a folder …
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {_one_line(message)}", file=sys.stderr, flush=True)
    return 2


def _one_line(text: str) -> str:
    """With line ends, and codes that terminals obey, written out: names in files may hold any."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
