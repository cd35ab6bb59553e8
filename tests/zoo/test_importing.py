import sys
from pathlib import Path

import pytest

from hvpspec.errors import InputError
from hvpspec.zoo.importing import call_by_name, is_code_name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_installed_callable_is_called_with_its_arguments() -> None:
    assert call_by_name("fractions:Fraction.from_float", {"f": 0.5}) == 0.5


def test_a_module_of_the_current_directory_is_found_and_the_path_restored(here: Path) -> None:
    (here / "own_helper_module.py").write_text("three = 3")
    (here / "own_module_here.py").write_text(
        "def double(x):\n    import own_helper_module\n    return 2 * x"
    )
    path = list(sys.path)
    assert call_by_name("own_module_here:double", {"x": 4}) == 8
    assert sys.path == path


def test_the_current_directory_shadows_nothing_installed(here: Path) -> None:
    sys.modules.pop("this_is_not_loaded", None)
    (here / "colorsys.py").write_text("rgb_to_hsv = lambda **_: 'shadowed'")
    sys.modules.pop("colorsys", None)
    assert call_by_name("colorsys:rgb_to_hsv", {"r": 0, "g": 0, "b": 0}) != "shadowed"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp2", "not of the form module:callable"),
        ("os.path", "not of the form"),
        ("os:", "not of the form"),
        (":getcwd", "not of the form"),
        ("a b:c", "not of the form"),
        (
            "no_such_module_anywhere:f",
            "cannot import 'no_such_module_anywhere'.*ModuleNotFoundError",
        ),
        ("os:no_such_name", "'os' has no 'no_such_name'"),
        ("os:sep", "is a str, which cannot be called"),
        ("os:getcwd", "os:getcwd failed when called as .x=1.: TypeError"),
    ],
)
def test_what_cannot_be_called_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call_by_name(name, {"x": 1})


@pytest.mark.parametrize("source", ["raise SystemExit(3)", "x = (", "1 / 0"])
def test_a_module_that_fails_to_import(here: Path, source: str) -> None:
    name = f"broken_{abs(hash(source))}"
    (here / f"{name}.py").write_text(source)
    with pytest.raises(InputError, match=f"cannot import '{name}'"):
        call_by_name(f"{name}:f", {})


def test_own_errors_pass_as_they_are(here: Path) -> None:
    (here / "refusing_module.py").write_text(
        "from hvpspec.errors import InputError\ndef f(): raise InputError('mine')"
    )
    with pytest.raises(InputError, match=r"^mine$"):
        call_by_name("refusing_module:f", {})


def test_code_names_are_told_from_files_and_drives() -> None:
    assert is_code_name("a.b:C.d")
    assert not any(map(is_code_name, ["data.npz", "C:/data.npz", "http://host/x", "mnist", ""]))
