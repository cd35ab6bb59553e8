"""Several processes that share out data, probes and long vectors give the answers of one."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import hvpspec
from hvpspec import (
    ComputationError,
    DataChangedError,
    GGNOperator,
    HessianOperator,
    InputError,
)
from hvpspec.linalg.krylov import KrylovSpace, lanczos
from hvpspec.linalg.ranks import ALONE, Ranks
from tests.processes import SERVER

# Far longer than anything here takes, and than a test waits for a process that hangs.
TIMEOUT = timedelta(seconds=60)


def problem(hidden: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with a large linear layer, and 23 examples, which cannot be shared out evenly."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(40, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 3)
    X = torch.randn(23, 40, generator=generator).double()
    return model, X, torch.randint(3, (23,), generator=generator)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def answers(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What there is to ask, of the examples that this process gives."""
    model, X, y = problem()
    ranks = Ranks(group)
    share = slice(ranks.rank, None, ranks.size)
    found: dict[str, Any] = {}
    # To trace takes as long as all else, in each of the processes: two are enough for it.
    traced = "auto" if ranks.size < 4 else "double-backward"
    # What follows is asked of the last.
    for reduction, engine in (("mean", traced), ("sum", "double-backward")):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        how: dict[str, Any] = {"l2": 0.1, "chunk_size": 8, "engine": engine, "group": group}
        H = HessianOperator(model, loss, (X[share], y[share]), **how)
        V = torch.randn(H.shape[0], 3, generator=seeded(), dtype=torch.float64)
        G = GGNOperator(model, loss, (X[share], y[share]), engine="double-backward", group=group)
        found |= {
            f"{reduction}, products": torch.cat([H @ V, H @ V, G @ V, -H @ V]),
            f"{reduction}, loss": H.loss(),
            f"{reduction}, gradient": H.gradient(),
            f"{reduction}, bounds": [A.structural_upper_bound().upper for A in (H, G)],
            f"{reduction}, matrix": H.to_dense(),
            f"{reduction}, block": H.block("2.*").to_dense(),
        }
    ignored = y.clone()
    ignored[::4] = -100  # which is all that the first of four processes has
    partial = HessianOperator(
        model,
        nn.CrossEntropyLoss(),
        (X[share], ignored[share]),
        engine="double-backward",
        group=group,
    )
    found |= {"ignored": partial @ V, "its bound": partial.structural_upper_bound().upper}
    measure = hvpspec.spectral_measure(H, 5, 12, generator=seeded(), block_size=2)
    found |= {"nodes": torch.cat(measure.nodes), "products spent": measure.num_matvecs}
    (run,) = lanczos(H, V[:, :1], 12)
    assert run.basis is not None
    assert run.next_vector is not None
    rows = torch.cat([run.basis, run.next_vector[None]])
    own = ranks.share(H.shape[0])
    assert rows.shape[1] == own.stop - own.start <= H.shape[0] / ranks.size + 1
    found["basis"] = ranks.whole(rows, H.shape[0])
    space = KrylovSpace(H, V, 12)
    while not space.full:
        space.expand()
    theta, S, _ = space.ritz()
    rows = space.rotate(S)
    assert rows.shape[1] == ranks.share_size(H.shape[0])
    found |= {"Ritz values": theta, "their vectors": ranks.whole(rows, H.shape[0]) ** 2}
    pairs = hvpspec.eigsh(H, 3)
    found |= {"eigenvalues": pairs.values, "eigenvectors": pairs.vectors}
    found["residuals"] = pairs.residual_norms < 1e-6
    for name in ("hutchinson", "hutch++", "xtrace"):
        estimate = hvpspec.trace(H, 30, generator=seeded(), method=name, block_size=4)
        found[name] = torch.tensor([estimate.value, estimate.sem])
    diagonal = hvpspec.diagonal(H, 30, generator=seeded(), block_size=4)
    found |= {"diagonal": diagonal.value, "its sem": diagonal.sem}
    for method in ("certified", "exact"):
        result = hvpspec.index(H, 1e-2, method=method, generator=seeded())
        found[method] = (result.index, result.lower, result.upper)
    return found | answers_of_probes(group)


def answers_of_probes(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """A measure of which the probes are shared out; with 4 processes, the data are, too."""
    model, X, y = problem()
    ranks = Ranks(group)
    data = None
    if ranks.size == 4:
        pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
        columns = [dist.new_group(pair) for pair in ([0, 2], [1, 3])]
        data, group = pairs[ranks.rank // 2], columns[ranks.rank % 2]
    mine = Ranks(data)
    share = slice(mine.rank, None, mine.size)
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X[share], y[share]), group=data)
    measure = hvpspec.spectral_measure(H, 5, 12, generator=seeded(), group=group)
    too_few = ""
    if ranks.size > 1:
        with pytest.raises(hvpspec.InputError, match="num_probes must be at least") as raised:
            hvpspec.spectral_measure(H, 1, 12, generator=seeded(), group=group)
        too_few = str(raised.value)
    assert ("got 1" in too_few) == (ranks.size > 1)
    return {"probes' nodes": torch.cat(measure.nodes), "probes' products": measure.num_matvecs}


def of_shards(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What there is to ask of a model whose parameters are shared out, while it is trained."""
    found: dict[str, Any] = {}
    for way in ("fully_shard", "tensor parallel"):
        model, X, y = problem(hidden=6)  # which tensor parallelism must be able to halve
        ranks = Ranks(group)
        if group is not None:
            mesh = init_device_mesh("cpu", (ranks.size,))
            if way == "fully_shard":
                fully_shard(model[0], mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        # Processes that have a part of each layer have all of the examples.
        data = ranks if way == "fully_shard" else ALONE
        share = slice(data.rank, None, data.size)
        loss = nn.CrossEntropyLoss(reduction="sum")
        adam = torch.optim.Adam(model.parameters(), lr=0.1, foreach=False)
        for step in range(2):
            adam.zero_grad()
            # Which fully_shard averages over the processes.
            (data.size * loss(model(X[share]), y[share])).backward()
            adam.step()
            with torch.no_grad():
                model(X[share])  # which leaves some parameters gathered
            H = HessianOperator(model, loss, (X[share], y[share]), chunk_size=4, group=data.group)
            V = torch.randn(H.shape[0], 3, generator=seeded(), dtype=torch.float64)
            found |= {
                f"{way}, {step}, products": torch.cat([H @ V, H @ V]),
                f"{way}, {step}, loss": H.loss(),
                f"{way}, {step}, gradient": H.gradient(),
                f"{way}, {step}, matrix": H.to_dense(),
                f"{way}, {step}, block": H.block(model[2]).to_dense(),
                f"{way}, {step}, bound": H.structural_upper_bound().upper,
                f"{way}, {step}, Adam": hvpspec.adam_preconditioner(adam, H),
            }
            assert not hasattr(H.gradient(), "full_tensor")
        for change in (lambda p: p.neg_(), lambda p: p.add_(0.1)):
            with torch.no_grad():
                change(next(model[2].parameters()))
            with pytest.raises(DataChangedError, match="the parameters are others"):
                H @ V
            H = HessianOperator(
                model, loss, (X[share], y[share]), engine="double-backward", group=data.group
            )
            H @ V
    return found


def of_one_parameter(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Of which one process has no share."""
    _, X, _ = problem()
    ranks = Ranks(group)
    share = slice(ranks.rank, None, ranks.size)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()).double()
    nn.init.constant_(model[0].weight, 0.5)
    H = HessianOperator(model, nn.MSELoss(), (X[share, :1], X[share, 1:2]), group=group)
    measure = hvpspec.spectral_measure(H, 2, 3, generator=seeded())
    return {
        "measure": torch.cat(measure.nodes),
        "eigenvalues": hvpspec.eigsh(H, 1).values,
        "certified": hvpspec.index(H, 1e-3, method="certified", generator=seeded()).estimate,
        "slq": hvpspec.index(H, 1e-3, method="slq", generator=seeded()).estimate,
        "trace": hvpspec.trace(H, generator=seeded()).value,
    }


def differ(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Processes have seen other data, and so have other running statistics."""
    _, X, y = problem()
    share = slice(Ranks(group).rank, None, 2)
    model = nn.Sequential(nn.BatchNorm1d(40), nn.Linear(40, 3)).double()
    with torch.no_grad():
        nn.init.zeros_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        model(X[share])
    H = HessianOperator(model.eval(), nn.CrossEntropyLoss(), (X[share], y[share]), group=group)
    with pytest.raises(InputError) as raised:
        H.loss()
    dist.broadcast(model[0].running_mean, src=0)
    dist.broadcast(model[0].running_var, src=0)
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X[share], y[share]), group=group)
    return {"message": str(raised.value), "loss": H.loss()}


def refused(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """What one process does otherwise than the other ends in both, with the same words."""
    model, X, y = problem()
    rank = Ranks(group).rank
    share = slice(rank, None, 2)

    def operator(X: Tensor) -> HessianOperator:
        return HessianOperator(model, nn.CrossEntropyLoss(), (X[share], y[share]), group=group)

    H, alone = operator(X), HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    found: dict[str, Any] = {}
    for name, ask in (
        ("density", lambda g: hvpspec.spectral_measure(H, 2, 3, generator=g)),
        ("probes", lambda g: hvpspec.spectral_measure(alone, 2, 3, generator=g, group=group)),
        ("index", lambda g: hvpspec.index(H, 1e-2, method="certified", generator=g)),
        ("eigenvalues", lambda g: hvpspec.eigsh(H, 1, generator=g)),
        ("trace", lambda g: hvpspec.trace(H, 6, generator=g)),
    ):
        with pytest.raises(InputError) as raised:
            ask(torch.Generator().manual_seed(rank))
        found[f"{name}, seeds differ"] = str(raised.value)
    overflown = X.clone()
    overflown[1] = math.inf  # of which the second process has the share
    with pytest.raises(hvpspec.NonFiniteError) as diverged:
        operator(overflown).loss()
    changed = X.clone()
    changed[1] *= 1 + 1e-9
    found["fingerprints"] = [operator(data).fingerprint()["data"] for data in (X, changed)]
    return found | {"diverged": str(diverged.value)}


def of_two(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """All of the last four."""
    return of_shards(group) | of_one_parameter(group) | differ(group) | refused(group)


def dies(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The last process ends at its third product, without a word."""
    model, X, y = problem()
    ranks = Ranks(group)
    share = slice(ranks.rank, None, ranks.size)
    H = HessianOperator(model, nn.CrossEntropyLoss(), (X[share], y[share]), group=group)
    for k in range(5):
        if k == 2 and ranks.rank == ranks.size - 1:
            os._exit(1)
        H @ torch.ones(H.shape[0], 1, dtype=torch.float64)
    raise AssertionError("a product was made without the last process")


def worker(
    what: Callable[[dist.ProcessGroup | None], dict[str, Any]], rank: int, size: int, folder: Path
) -> None:
    """Be one process of several, and write down what was found."""
    torch.set_num_threads(1)
    store = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", store, TIMEOUT, size, rank)
    try:
        found: Any = what(dist.group.WORLD)
    except ComputationError as error:
        found = {"error": str(error)}
    except BaseException:
        found = {"error": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.pt")


def together(
    what: Callable[[dist.ProcessGroup | None], dict[str, Any]], size: int, folder: Path
) -> list[dict[str, Any]]:
    """What each process found that wrote something down; none may hang."""
    processes = [
        SERVER.Process(target=worker, args=(what, rank, size, folder)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(2 * TIMEOUT.seconds)
            assert process.exitcode is not None, "a process hangs"
    finally:
        for process in processes:
            process.kill()
    return [torch.load(path) for path in sorted(folder.glob("*.pt"))]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What one process answers."""
    return answers(None)


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_answers(size: int, expected: dict[str, Any], tmp_path: Path) -> None:
    found = together(answers, size, tmp_path)
    assert len(found) == size
    for each in found:
        assert "error" not in each, each["error"]
        assert each.keys() == expected.keys()
        for name, value in expected.items():
            # Some hundred roundings of numbers up to 100, and what Lanczos makes of them.
            torch.testing.assert_close(each[name], value, rtol=1e-9, atol=1e-10, msg=name)
        for name, value in found[0].items():  # no process decides by other bits
            torch.testing.assert_close(each[name], value, rtol=0, atol=0, msg=name)


def test_models_that_are_shared_out_and_other_networks(tmp_path: Path) -> None:
    """All that two processes are enough for, which take longer to start than to answer."""
    expected = of_shards(None) | of_one_parameter(None)
    found = together(of_two, 2, tmp_path)
    assert len(found) == 2
    for rank, each in enumerate(found):
        assert "error" not in each, each["error"]
        for name, value in expected.items():
            torch.testing.assert_close(each[name], value, rtol=1e-9, atol=1e-9, msg=name)
        assert each["message"] == (
            f"process {rank} has another 0.running_mean in the network than process {1 - rank}; "
            "send parameters and buffers of one to all with torch.distributed.broadcast"
        )
        assert each["loss"] == pytest.approx(math.log(3))
        for name in ("density", "probes", "index", "eigenvalues", "trace"):
            assert each[f"{name}, seeds differ"].startswith(
                "generator: the processes have generators in different"
            )
        assert "chunk 0 of the data" in each["diverged"]
        before, after = each["fingerprints"]
        assert before.split()[0] == after.split()[0]
        assert before.split()[1] != after.split()[1]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("DataParallel", "pass the .module inside, and group="),
        ("DistributedDataParallel", "pass the .module inside, and group="),
        ("FullyShardedDataParallel", "shard it with torch.distributed.fsdp.fully_shard"),
    ],
)
def test_wrappers_that_are_refused(kind: str, remedy: str) -> None:
    """By their names, since most of them cannot be made in one process."""
    wrapper = type(kind, (nn.Sequential,), {})
    _, X, y = problem()
    model = nn.Sequential(wrapper(nn.Linear(40, 3)))
    with pytest.raises(InputError, match=f"while its module '0' is wrapped in {kind}; {remedy}"):
        HessianOperator(model, nn.CrossEntropyLoss(), (X, y))
    with pytest.raises(InputError, match=f"while it is wrapped in {kind}; "):
        HessianOperator(wrapper(model), nn.CrossEntropyLoss(), (X, y))


def test_a_group_of_others_is_refused() -> None:
    model, X, y = problem()
    outside: Any = dist.GroupMember.NON_GROUP_MEMBER  # what new_group gives to other processes
    with pytest.raises(InputError, match=r"group is .*, to which this process belongs"):
        HessianOperator(model, nn.CrossEntropyLoss(), (X, y), group=outside)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    (found,) = together(dies, 2, tmp_path)
    assert found["error"].startswith("another process ended, or did not answer in time (")


@pytest.mark.parametrize("n", [1, 3, 8, 9])
def test_shares_of_a_vector(n: int) -> None:
    class Three(Ranks):
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

    shares = [Three(rank).share(n) for rank in range(3)]
    assert [i for s in shares for i in range(n)[s]] == list(range(n))
    lengths = [s.stop - s.start for s in shares]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1
