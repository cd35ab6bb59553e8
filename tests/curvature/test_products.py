"""Every way to multiply gives the same products, and what cannot be trusted is not used."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvpspec import (
    ComputationError,
    DataChangedError,
    DenseOperator,
    HessianOperator,
    InputError,
    Loss,
    eigsh,
    index,
    spectral_measure,
    trace,
)
from hvpspec.curvature import choice
from hvpspec.curvature.choice import Cost, Count, Plan, choose, most_at_once
from hvpspec.curvature.data import Batch
from hvpspec.curvature.engines import DoubleBackward
from hvpspec.linalg import SymmetricOperator
from hvpspec.zoo import cnn, mlp2

ENGINES = ["double-backward", "batched", "linearised"]
CPU = torch.device("cpu")


class Attention(nn.Module):
    """A language model of one block, with tied weights and targets to ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(nn.functional.gelu(x)).mT


class Normalised(nn.Sequential):
    """A residual network's parts, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(),
            nn.Linear(3 * 36, 4),
        )  # fmt: skip
        self.eval()


def problem(name: str) -> tuple[nn.Module, Any, Any]:
    """A network, its loss and data of five examples or more."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = torch.rand(5, 1, 28, 28).double(), torch.randint(10, (5,))
        if name == "mlp2":
            return mlp2("tanh").double(), nn.CrossEntropyLoss(), (images[..., :28, :], labels)
        if name == "cnn":
            return cnn("relu").double(), nn.CrossEntropyLoss(reduction="sum"), (images, labels)
        if name == "attention":
            labels = torch.randint(11, (5, 7))
            labels[0, 3:] = labels[4] = -100
            tokens = torch.randint(11, (5, 7))
            return Attention().double(), nn.CrossEntropyLoss(), (tokens, labels)
        images = torch.rand(6, 1, 8, 8).double()
        return Normalised().double(), nn.MSELoss(), (images, torch.rand(6, 4).double())


# Tracing takes as long for one vector: two networks are enough for that.
@pytest.mark.parametrize(
    ("name", "width"),
    [("mlp2", 1), ("normalised", 1), *((n, 3) for n in ("mlp2", "cnn", "attention", "normalised"))],
)
def test_all_ways_agree(name: str, width: int) -> None:
    """Kept with a ragged last chunk, and evaluated again example by example."""
    model, loss, data = problem(name)
    V = torch.randn(sum(p.numel() for p in model.parameters()), width).double()
    expected = HessianOperator(model, loss, data, l2=0.3, engine=ENGINES[0]) @ V
    for engine in ENGINES:
        # Each size of a chunk is traced, which is what takes long.
        for budget, size in ((0, 1), (None, 4)):
            H = HessianOperator(
                model, loss, data, l2=0.3, chunk_size=size, engine=engine, memory_budget=budget
            )
            for _ in range(3):
                torch.testing.assert_close(H @ V, expected, rtol=1e-11, atol=1e-13)
            (plan,) = H.plan
            if width == 1 and engine == "batched":  # of one vector there is no block
                assert plan.engine == "double-backward"
            else:
                assert plan.engine == engine
            assert plan.num_vectors == width
            assert plan.kept == (budget is None)
            assert plan.notes == ()
            assert H.num_matvecs == 3 * width


@pytest.mark.parametrize("engine", ENGINES)
def test_products_are_linear_to_the_last_digit(engine: str) -> None:
    """PyTorch's forward derivative of a group's norm has a constant term, of size round-off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
        ).double()
        data = torch.randn(6, 1, 5, 5).double(), torch.randint(2, (6,))
        V = torch.randn(sum(p.numel() for p in model.parameters()), 3, dtype=torch.float64)
    H = HessianOperator(model, nn.CrossEntropyLoss(), data, engine=engine)
    for _ in range(2):
        expected = H @ V
    assert H.plan[0].engine == engine
    # A power of two, so that nothing is rounded.
    assert torch.equal((H @ (V * 2**-60)) * 2**60, expected)
    assert torch.equal(H @ (V * 0), V * 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_vectors_may_lie_anywhere_and_products_are_new(engine: str) -> None:
    """Rows of a basis, as Lanczos has them, the columns of a matrix, and inference tensors."""
    model, loss, data = problem("mlp2")
    H = HessianOperator(model, loss, data, l2=0.3, chunk_size=2, engine=engine)
    n = H.shape[0]
    basis = torch.randn(3, 4, n, generator=torch.Generator().manual_seed(0)).double()
    expected = H @ basis[:, 1].T.contiguous()
    with torch.inference_mode():
        inferred = basis.clone()[:, 1].T
    for V in (basis[:, 1].T, basis[:, 1].T.contiguous(), inferred, basis[:, 1].T[:, :1]):
        before = V.clone()
        product = H @ V
        torch.testing.assert_close(product, expected[:, : V.shape[1]], rtol=1e-11, atol=1e-13)
        kept = product.clone()
        H @ (V * 2)
        assert torch.equal(product, kept)
        assert torch.equal(V, before)


def test_some_of_the_parameters() -> None:
    model, loss, data = problem("cnn")
    for engine in ENGINES:
        H = HessianOperator(model, loss, data, params="conv*", engine=engine)
        V = torch.randn(H.shape[0], 2, dtype=torch.float64)
        first = H @ V
        torch.testing.assert_close(H @ V, first, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_asked_for_makes_every_product(engine: str) -> None:
    """Also the first, so that a run that goes on makes the same."""
    model, loss, data = problem("normalised")
    H = HessianOperator(model, loss, data, engine=engine)
    V = torch.randn(H.shape[0], 2, dtype=torch.float64)
    assert torch.equal(H @ V, H @ V)
    assert [plan.engine for plan in H.plan] == [engine]


COSTS = {
    # Measured: a perceptron 300-24-24-10 on 500 examples, and a GPT of 0.9 million parameters.
    "perceptron": Cost(calls=1e-3, arithmetic=1e-3, num_nodes=41, largest=600_000, size=900_000),
    "gpt": Cost(calls=1e-2, arithmetic=0.12, num_nodes=550, largest=2**20, size=45_000_000),
}


def test_what_is_expected_decides_whether_to_trace() -> None:
    """The perceptron is traced when that takes a tenth of 1,640 products, the GPT of 339."""
    for name, least, before in (("perceptron", 1640, "batched"), ("gpt", 339, "double-backward")):
        cost = COSTS[name]
        assert choose(cost, 0, CPU) == before
        assert choose(cost, least - 1, CPU) == before
        assert choose(cost, least, CPU) == "linearised"
        assert choose(cost, 0, torch.device("cuda")) == "batched"


def test_blocks_are_parted_where_results_or_memory_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cost = COSTS["gpt"]  # with results of 1 MB
    assert [most_at_once(cost, width, CPU) for width in (1, 8, 9, 20, 100)] == [1, 8, 9, 10, 15]
    assert most_at_once(COSTS["perceptron"], 100, CPU) == 25
    assert most_at_once(replace(cost, largest=2**22), 8, CPU) == 1
    assert most_at_once(replace(cost, largest=2**22), 8, torch.device("meta")) == 8
    monkeypatch.setattr(choice, "available_memory", lambda device: 3 * 4 * cost.size)
    assert most_at_once(cost, 8, CPU) == 3
    monkeypatch.setattr(choice, "available_memory", lambda device: 0)
    assert most_at_once(cost, 8, CPU) == 1


def test_the_choice_does_not_depend_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unannounced products are linearised after the same number of them in each run."""
    runs = []
    for speed in (1e-3, 1e3):
        start = time.perf_counter()
        with monkeypatch.context() as patch:
            clock = time.perf_counter
            patch.setattr(
                "time.perf_counter",
                lambda start=start, speed=speed, clock=clock: start + (clock() - start) * speed,
            )
            patch.setattr(choice, "_SECONDS_PER_NODE", 1e-5)
            model, loss, data = problem("mlp2")
            H = HessianOperator(model, loss, data)
            V = torch.ones(H.shape[0], 2, dtype=torch.float64)
            engines, products = [], []
            for _ in range(20):
                products.append(H @ V)
                engines.append(H.plan[0].engine)
        runs.append((engines, torch.stack(products)))
    (engines, products), (again, same) = runs
    assert engines == again
    assert set(engines) == {"batched", "linearised"}
    assert torch.equal(products, same)
    torch.testing.assert_close(products[0], products[-1], rtol=1e-11, atol=1e-13)


def test_announced_products_are_linearised_from_the_first() -> None:
    model, loss, data = problem("mlp2")
    H = HessianOperator(model, loss, data)
    H.expect(10, 2)
    V = torch.ones(H.shape[0], 2, dtype=torch.float64)
    first = H @ V
    assert [plan.engine for plan in H.plan] == ["batched"]
    H.expect(10**6, 2)
    second = H @ V
    assert [plan.engine for plan in H.plan] == ["linearised"]
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13)
    H.expect(10**7, 2)
    assert torch.equal(H @ V, second)


def test_counts_are_those_of_the_arithmetic() -> None:
    A, threads = torch.randn(300, 400), torch.get_num_threads()
    with Count() as count:
        A.T @ A
    # 2 x 300 x 400 x 400 operations at 50 GF/s and thread, and two calls, of which one is a view.
    assert count.arithmetic == pytest.approx(2 * 300 * 400**2 / 5e10 / threads)
    assert count.calls == pytest.approx(2e-5)
    with Count() as count:
        A + A
    assert count.arithmetic == pytest.approx(4 * A.numel() / 1e10)
    for channels, speed in ((4, 1e10), (2, 2.5e9)):  # 16 pairs of channels, and 4
        weight = torch.randn(channels, channels, 3, 3)
        images = torch.randn(2, channels, 10, 10, requires_grad=True)
        flops = 2 * 2 * 8 * 8 * weight.numel()
        with Count() as count:
            y = nn.functional.conv2d(images, weight)
        assert count.arithmetic == pytest.approx(flops / speed / threads)
        with Count() as count:
            torch.autograd.grad(y, images, y.detach())
        assert count.arithmetic >= flops / speed / threads


def test_a_short_run_is_not_traced() -> None:
    model, loss, data = problem("mlp2")
    H = HessianOperator(model, loss, data)
    for _ in range(2):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert H.plan == (Plan("double-backward", 1, 1, True),)


def test_a_block_is_multiplied_in_parts_of_equal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is filled up with zeros, so that one trace serves all."""
    model, loss, data = problem("cnn")
    V = torch.randn(552, 7, dtype=torch.float64)
    expected = HessianOperator(model, loss, data, engine="double-backward") @ V
    monkeypatch.setattr(choice, "_MOST_VECTORS", 3)
    for engine in ("batched", "linearised"):
        H = HessianOperator(model, loss, data, engine=engine)
        for _ in range(2):
            torch.testing.assert_close(H @ V, expected, rtol=1e-11, atol=1e-13)
        assert [(plan.num_vectors, plan.at_once) for plan in H.plan] == [(7, 3)]


def test_compiled() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.rand(9, 3).double(), torch.randint(2, (9,))
    V = torch.randn(26, 2, dtype=torch.float64)
    H = HessianOperator(model, nn.CrossEntropyLoss(), data, engine="compiled")
    expected = H @ V
    torch.testing.assert_close(H @ V, expected, rtol=1e-11, atol=1e-13)
    (plan,) = H.plan
    compiled = plan.engine == "compiled"
    assert compiled or "not possible here" in plan.notes[0]  # where there is no compiler


class Untraceable(nn.Linear):
    """Looks at a value, which a graph of tensor operations cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if float(x.sum()) > -1e9 else 3)


def test_what_cannot_be_traced_is_differentiated_twice() -> None:
    data = torch.rand(5, 3), torch.randint(2, (5,))
    H = HessianOperator(Untraceable(3, 2), nn.CrossEntropyLoss(), data, engine="linearised")
    v = torch.ones(8)
    expected = H @ v
    assert torch.equal(H @ v, expected)
    (plan,) = H.plan
    assert plan.engine == "double-backward"
    assert plan.notes[0].startswith("linearised, 1 at once: not possible here (")


@pytest.mark.usefixtures("wrong_operation")
def test_an_engine_that_differs_is_dropped_with_a_warning() -> None:
    data = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    model, loss = nn.Linear(3, 2).double(), nn.MSELoss()
    H = HessianOperator(model, loss, data, engine="linearised")
    v = torch.randn(8, dtype=torch.float64)
    expected = HessianOperator(model, loss, data, engine="double-backward") @ v
    with pytest.warns(UserWarning, match="linearised products differ from those of"):
        product = H @ v
    assert torch.equal(product, expected)
    assert H.plan[0].engine == "double-backward"


@pytest.mark.parametrize("engine", ENGINES)
def test_changes_are_found_out_though_nothing_is_read_again(engine: str) -> None:
    for change in ("data", "weights", "loss"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        X, y = torch.rand(5, 3), torch.randint(2, (5,))
        H = HessianOperator(model, nn.CrossEntropyLoss(), (X, y), engine=engine)
        V = torch.randn(26, 2)
        for _ in range(3):
            H @ V
        assert H.plan[0].kept
        with torch.no_grad():
            if change == "data":
                X.mul_(2)
            elif change == "weights":
                model[0].weight.mul_(2)
            else:
                y.copy_(1 - y)
        with pytest.raises(DataChangedError):
            H @ V


@pytest.mark.parametrize("engine", ENGINES)
def test_changes_are_found_out_on_a_pass(engine: str) -> None:
    class Restless:
        """A loader whose later passes give other data."""

        changed = False

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(int(self.changed))
            for _ in range(2):
                yield torch.rand(4, 3, generator=generator), torch.ones(4, dtype=torch.long)

    loader = Restless()
    H = HessianOperator(
        nn.Linear(3, 2), nn.CrossEntropyLoss(), loader, engine=engine, memory_budget=0
    )
    V = torch.ones(8, 2)
    H @ V, H @ V
    loader.changed = True
    with pytest.raises(DataChangedError):
        H @ V


def test_a_block_wider_than_memory_allows_is_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, data = problem("cnn")
    V = torch.randn(552, 5, dtype=torch.float64)
    expected = HessianOperator(model, loss, data) @ V
    monkeypatch.setattr(choice, "available_memory", lambda device: 2**20)
    H = HessianOperator(model, loss, data, engine="linearised", memory_budget=0)
    for _ in range(2):
        torch.testing.assert_close(H @ V, expected, rtol=1e-11, atol=1e-13)
    assert [(plan.num_vectors, plan.at_once) for plan in H.plan] == [(5, 1)]
    assert H.num_matvecs == 10


LARGE_VOCABULARY = """
import resource
import torch
from torch import nn
from hvpspec import HessianOperator, next_token_loss

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

n, length, vocabulary = 96, 16, 50_000
net = nn.Sequential(nn.Embedding(vocabulary, 4), nn.Linear(4, vocabulary))
tokens = torch.randint(vocabulary, (n, length))
before = peak()
H = HessianOperator(net, next_token_loss, (tokens, tokens))
H @ torch.randn(H.shape[0])
print((peak() - before) / (4 * n * length * vocabulary))
"""


def test_a_large_vocabulary_takes_memory_for_some_logits_at_a_time() -> None:
    # In one graph, logits and what is computed from them are eight times as large as they are.
    run = subprocess.run(
        [sys.executable, "-c", LARGE_VOCABULARY], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 2


def test_a_chunk_counts_for_no_more_than_itself() -> None:
    """Though it lies in the storage of all data, here 200 times as large."""
    X, y = torch.rand(4000, 64).double(), torch.randint(2, (4000,))  # 2 MB
    H = HessianOperator(
        nn.Linear(64, 2).double(),
        nn.CrossEntropyLoss(),
        (X, y),
        chunk_size=20,
        engine="double-backward",
        memory_budget=2 * X.nbytes,
    )
    H @ torch.randn(H.shape[0], 4, dtype=torch.float64)
    assert [(plan.num_vectors, plan.kept) for plan in H.plan] == [(4, True)]


def large_in(hidden: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A perceptron on 90 examples, and what a block of 4 takes of them in hidden units."""
    model = nn.Sequential(nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()
    return model, (torch.rand(90, 16).double(), torch.randint(2, (90,)))


def test_a_loss_that_weighs_its_examples() -> None:
    model = nn.Linear(3, 2).double()
    data = torch.rand(5, 3).double(), torch.rand(5, 2).double()
    loss = Loss(lambda out, t: ((out - t) ** 4 * t).sum() / t.sum(), weight=lambda out, t: t.sum())
    first = None
    for engine in ENGINES:
        H = HessianOperator(model, loss, data, chunk_size=2, engine=engine)
        for _ in range(2):
            product = H @ torch.ones(8, 2, dtype=torch.float64)
            first = product if first is None else first
            torch.testing.assert_close(product, first, rtol=1e-11, atol=1e-13)


def test_a_chunk_in_which_nothing_counts() -> None:
    """Its mean is 0/0, and so are the derivatives of that."""
    model = nn.Linear(3, 1).double()
    targets = torch.tensor([[1.0], [0.0], [2.0], [0.0], [0.0], [0.0]]).double()
    data = torch.rand(6, 3).double(), targets

    def counted(_: Tensor, target: Tensor) -> Tensor:
        return (target > 0).sum()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        counts = target > 0
        return ((output - target) ** 4 * counts).sum() / counts.sum()

    V = torch.ones(4, 2, dtype=torch.float64)
    expected = HessianOperator(model, Loss(loss, weight=counted), data) @ V
    for engine in ENGINES:
        H = HessianOperator(model, Loss(loss, weight=counted), data, chunk_size=3, engine=engine)
        for _ in range(2):
            torch.testing.assert_close(H @ V, expected, rtol=1e-11, atol=1e-13)


def test_bad_options() -> None:
    model, loss, data = problem("cnn")
    with pytest.raises(InputError, match=r"engine must be one of 'auto', .*, got 'fast'"):
        HessianOperator(model, loss, data, engine="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="memory_budget must be at least 0 bytes, got -1"):
        HessianOperator(model, loss, data, memory_budget=-1)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_out_of_memory_it_goes_on_with_smaller_chunks(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more than 5 examples do not fit, for the first product and later ones."""
    model, data = large_in(3)
    V = torch.randn(sum(p.numel() for p in model.parameters()), 2, dtype=torch.float64)
    expected = HessianOperator(model, nn.CrossEntropyLoss(), data) @ V
    true_prepare = DoubleBackward.prepare
    most = 5

    def prepare(self: DoubleBackward, k: int, batch: Batch) -> Any:
        if batch.num_examples > most:
            raise error
        return true_prepare(self, k, batch)

    monkeypatch.setattr(DoubleBackward, "prepare", prepare)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=40)
    for each in (data, loader):
        H = HessianOperator(model, nn.CrossEntropyLoss(), each)
        with pytest.warns(UserWarning, match="examples in a chunk: going on with") as warned:
            product = H @ V
        torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-13)
        assert str(warned[-1].message).endswith("going on with 5" if each is loader else "with 3")
        torch.testing.assert_close(H @ V, expected, rtol=1e-11, atol=1e-13)
        assert H.num_matvecs == 4
    most = 0
    with (
        pytest.warns(UserWarning, match="in a chunk: going on with"),
        pytest.raises(ComputationError, match="out of memory on a single example"),
    ):
        HessianOperator(model, nn.CrossEntropyLoss(), data) @ V


class Greedy(nn.Sequential):
    """A model for which more than some examples at a time are too many."""

    most = 16

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise MemoryError
        result: Tensor = super().forward(x)
        return result


@pytest.mark.parametrize("ask", ["products", "loss", "gradient", "bound", "index"])
def test_out_of_memory_wherever_the_data_are_gone_over(ask: str) -> None:
    model, (X, y) = large_in(3)
    greedy = Greedy(*model)
    answers: dict[str, Any] = {
        "products": lambda H: H @ torch.ones(H.shape[0], 2, dtype=torch.float64),
        "loss": lambda H: torch.tensor(H.loss(), dtype=torch.float64),
        "gradient": lambda H: H.gradient(),
        "bound": lambda H: torch.tensor(H.structural_upper_bound().upper),
        "index": lambda H: torch.tensor(index(H, 1e-3, method="certified").index),
    }
    expected = answers[ask](HessianOperator(model, nn.CrossEntropyLoss(), (X, y)))
    # By an engine that asks the network in each pass.
    asking: dict[str, Any] = {"engine": "double-backward", "memory_budget": 0}
    H = HessianOperator(greedy, nn.CrossEntropyLoss(), (X, y), **asking)
    with pytest.warns(UserWarning, match="going on with") as warned:
        found = answers[ask](H)
    told = [str(w.message).split()[4] for w in warned if "going on" in str(w.message)]
    assert told == ["90", "45", "23"]  # 12 fit
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    if ask == "loss":  # of which no pass is made again
        return
    greedy.most = 5  # as if something else took memory meanwhile
    with pytest.warns(UserWarning, match="going on with") as warned:
        found = answers[ask](H)
    told = [str(w.message).split()[4] for w in warned if "going on" in str(w.message)]
    assert told == ["12", "6"]  # 3 fit
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_algorithms_announce_their_products() -> None:
    """Through operators around operators, too."""
    announced: list[tuple[int, int]] = []

    class Listening(DenseOperator):
        def expect(self, num_vectors: int, width: int) -> None:
            announced.append((num_vectors, width))

    A = Listening(torch.diag(torch.arange(1.0, 41.0).double()))
    questions: dict[str, Callable[[SymmetricOperator], object]] = {
        "density": lambda A: spectral_measure(A, 3, 5),
        "trace": lambda A: trace(A, 20, block_size=4),
        "eigsh": lambda A: eigsh(A, 2),
        "certified": lambda A: index(A, 1e-3, method="certified"),
        "filtered": lambda A: index(A, 1e-3, method="filtered"),
    }
    for name, ask in questions.items():
        for around in (A, A.shifted(1.0), -A):
            announced.clear()
            before = A.num_matvecs
            ask(around)
            assert announced, name
            if name in ("density", "trace"):
                assert announced[-1] == {"density": (15, 3), "trace": (20, 4)}[name]
                assert A.num_matvecs - before <= announced[-1][0] + 4  # of the symmetry's check
