import pytest

from hvpspec.cli.options import parse_net_args
from hvpspec.errors import InputError


def test_values_become_what_they_look_like():
    pairs = ["a=1", "b=0.5", "c=true", "d=False", "e=none", "f=relu", "g=[1, 2]", "h=", "i=a=b"]
    assert parse_net_args(pairs) == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": False,
        "e": None,
        "f": "relu",
        "g": [1, 2],
        "h": "",
        "i": "a=b",
    }


def test_a_value_may_look_like_json_as_deep_as_it_likes():
    deep = "[" * 100_000
    assert parse_net_args([f"a={deep}"]) == {"a": deep}


@pytest.mark.parametrize("pairs", [None, []])
def test_no_arguments_are_not_an_empty_set_of_them(pairs):
    assert parse_net_args(pairs) is None


@pytest.mark.parametrize("pairs", [["tanh"], ["=tanh"], ["a b=1"], ["a=1", "a=2"]])
def test_malformed_arguments(pairs):
    with pytest.raises(InputError, match="--net-arg"):
        parse_net_args(pairs)
