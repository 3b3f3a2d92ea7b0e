"""Every test here compiles Triton kernels for GPUs that are not here: minutes the first time."""

import os
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".cache/fastelectra/triton"))
