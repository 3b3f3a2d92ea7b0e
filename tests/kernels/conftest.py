"""Triton interprets or compiles, never both in a process: interpreted/ needs TRITON_INTERPRET=1."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["compiled"] if INTERPRETED else ["interpreted"]
