import subprocess
import sys

from hvpspec import zoo


def test_every_public_name_exists_and_is_documented() -> None:
    assert [name for name in zoo.__all__ if getattr(zoo, name).__doc__ is None] == []


def test_importing_the_zoo_leaves_torchvision_alone() -> None:
    code = "import hvpspec.zoo, sys; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
