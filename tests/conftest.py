"""Settings of the whole test run."""

import os

from hypothesis import settings

# Threads that spin while they wait make a busy machine many times slower; said before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The same examples in every run: what is red was red before the change. To search anew, run with
# --hypothesis-profile default.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
