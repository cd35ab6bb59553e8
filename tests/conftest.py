"""Settings of the whole test run."""

import os

# Threads that spin while they wait make a busy machine many times slower; said before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
