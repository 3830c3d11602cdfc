"""One thread for torch: the tests' tensors are small, and two threads on two busy cores only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
