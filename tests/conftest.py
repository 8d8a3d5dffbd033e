"""What holds for all tests."""

import os

# Many processes share few cores here, and models are tiny: threads that wait for each other at every operation cost
# more than they give. Ranks, servers and commands that tests start inherit it; PyTorch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
