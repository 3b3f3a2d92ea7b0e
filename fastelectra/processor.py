"""numba, set to use the whole of this CPU's vectors.

numba reads its settings when the first function is decorated, and they hold for all that it
compiles in the process: so whatever decorates takes numba from here.
"""

import numba

# of what numba compiles for; none are known where it has been asked for another CPU than this
FEATURES = frozenset()
if not (numba.config.CPU_NAME or numba.config.CPU_FEATURES):
    from numba.core.codegen import get_host_cpu_features

    FEATURES = frozenset(get_host_cpu_features().split(","))
    if "+avx512f" in FEATURES:  # LLVM takes half of a vector on Intel's CPUs unless told
        numba.config.CPU_FEATURES = ",".join([*sorted(FEATURES), "-prefer-256-bit"])
