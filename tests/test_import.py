"""What importing loads: looked at in one process of its own, since other tests load everything."""

import subprocess
import sys

SCRIPT = """
import sys
import hvpspec

# Rooms are there after importing the package, and no module in them hides a function.
hvpspec.spectrum, hvpspec.recording, hvpspec.curvature, hvpspec.zoo
import hvpspec.linalg.krylov
assert callable(hvpspec.linalg.lanczos) and callable(hvpspec.linalg.trace)
heavy = {'matplotlib', 'typer', 'torchvision'} & set(sys.modules)
assert not heavy, heavy

hvpspec.zoo.mlp2()
assert 'torchvision' not in sys.modules

import hvpspec.plotting
hvpspec.plotting.plot_spectrum([-1.0, 0.0, 2.0], noise_floor=0.1)
assert 'matplotlib.pyplot' not in sys.modules  # which looks for a display
"""


def test_nothing_is_loaded_before_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
