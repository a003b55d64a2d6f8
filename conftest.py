"""Settings of this repository's own test run."""

import os

# Before torch is imported: several workers with several threads each would fight for the same cores
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
