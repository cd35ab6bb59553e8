import pytest
import torch

from hvpspec.errors import InputError
from hvpspec.zoo import build_network
from hvpspec.zoo.networks import seeded


def test_same_seed_draws_the_same_numbers_and_another_does_not() -> None:
    draws = []
    for seed in (3, 3, 4):
        with seeded(seed):
            draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_state_is_restored_even_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(InputError), seeded(3):
        build_network("mlp9", {"drawn": torch.rand(5)})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "0", None])
def test_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(InputError, match=r"seed is .*whole number"), seeded(seed):  # type: ignore[arg-type]
        pass
