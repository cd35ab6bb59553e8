import os
from pathlib import Path

import pytest


@pytest.fixture
def trap(tmp_path: Path) -> tuple[object, Path]:
    """An object whose unpickling makes a folder, and that folder."""
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(sprung),)

    return Trap(), sprung
