"""What all tests share: one torch thread for each process, so that tests that run beside each other do not get in each
other's way. Set before torch is imported, and inherited by the processes that tests start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
