"""Hessians of networks with 11 and 124 million parameters, on a machine with two cores.

- ``resnet18``: ResNet-18 for images of 32 x 32, trained on the bundled sample of Fashion-MNIST
  (padded, in three channels): density, a few eigenvalues at both ends, trace, and the certified
  index at coarser and finer resolutions, as far down as the products reach.
- ``gpt2``: a language model of GPT-2's size with random weights, on this project's own
  documentation byte by byte: the ends of the spectrum, by Lanczos with its basis on a disk, and the
  trace. Needs the package transformers.

Each answer is written as it is found.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpspec
from benchmarks.measuring import machine
from benchmarks.networks import resnet18
from hvpspec import HessianOperator, SpectralMeasure, SymmetricOperator
from hvpspec.plotting import plot_density, save_figure
from hvpspec.report import measure_to_dict
from hvpspec.zoo import Dataset, TrainingSettings, load_data, train

ROOT = Path(__file__).parents[1]

#: Resolutions of the ladder, in units of the largest eigenvalue.
RATIOS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


class Results:
    """What was found, in a file that grows, with the seconds and products that each took.

    Args:
        path: the JSON file.
        about: what it is about.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._content = path, {**about, "machine": machine("float32")}

    def add(self, name: str, A: SymmetricOperator, ask: Callable[[], Any]) -> Any:
        """Ask a question, and write down what it took; what was answered is added by ``write``."""
        before, start = A.num_matvecs, time.perf_counter()
        answer = ask()
        seconds, products = time.perf_counter() - start, A.num_matvecs - before
        self.write(name, {"seconds": round(seconds, 1), "products": products})
        print(f"{name}: {products} products, {seconds:.0f} s", flush=True)
        return answer

    def write(self, name: str, fields: dict[str, Any]) -> None:
        """Add fields under a name."""
        self._content.setdefault(name, {}).update(fields)
        self._path.write_text(json.dumps(self._content, indent=1) + "\n")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--what", nargs="+", choices=list(WHAT), default=list(WHAT))
    parser.add_argument("--images", type=int, default=64, help="in ResNet-18's Hessian")
    parser.add_argument("--epochs", type=int, default=5, help="of ResNet-18's training")
    parser.add_argument("--steps", type=int, default=30, help="of Lanczos")
    parser.add_argument("--samples", type=int, default=20, help="of Hutchinson's trace")
    parser.add_argument("--most", type=int, default=120, help="products for the index")
    parser.add_argument("--texts", type=int, default=4, help="of 64 bytes, in GPT-2's Hessian")
    parser.add_argument("--out", type=Path, default=Path("out/large"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for what in options.what:
        WHAT[what](options)


def of_resnet18(options: argparse.Namespace) -> None:
    """Train ResNet-18 a little, and ask all there is to ask."""
    data = load_data("fashion-mnist-sample")
    images, labels = data.tensors
    images = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    torch.manual_seed(0)
    model = resnet18()
    settings = TrainingSettings(epochs=options.epochs, lr=0.02, momentum=0.9, batch_size=64)
    history = train(model, Dataset(data.name, images, labels), settings)
    chosen = slice(0, options.images)
    H = HessianOperator(model.eval(), nn.CrossEntropyLoss(), (images[chosen], labels[chosen]))
    results = Results(
        options.out / "resnet18.json",
        {
            "network": "ResNet-18 for images of 32 x 32",
            "parameters": H.shape[0],
            "data": f"first {options.images} images of {data.name}",
            "training": {**asdict(settings), "loss": history.loss, "accuracy": history.accuracy},
        },
    )
    results.write("point", {"loss": H.loss(), "gradient_norm": float(H.gradient().norm())})
    measure = density(H, results, options, probes=2)
    figure = plot_density(
        measure, symlog=True, title=f"ResNet-18, {H.shape[0]:,} parameters, {options.images} images"
    )
    save_figure(figure, options.out / "resnet18.png")
    pairs = results.add(
        "extremes", H, lambda: hvpspec.eigsh(H, 4, "BE", tol=1e-2, max_matvecs=options.most)
    )
    results.write(
        "extremes",
        {"values": pairs.values.tolist(), "residual_norms": pairs.residual_norms.tolist()},
    )
    hutchinson(H, results, options)
    taus = [ratio * float(pairs.values[-1]) for ratio in RATIOS]
    result = results.add(
        "index",
        H,
        lambda: hvpspec.index(
            H,
            taus[-1],
            tau_ladder=taus[:-1],
            method="certified",
            confidence=0.95,
            generator=torch.Generator().manual_seed(0),
            max_matvecs=options.most,
        ),
    )
    ladder = [asdict(rung) | {"ratio": r} for r, rung in zip(RATIOS, result.ladder, strict=True)]
    results.write(
        "index", {"ladder": ladder, "noise_floor": result.noise_floor, "confidence": 0.95}
    )


def of_gpt2(options: argparse.Namespace) -> None:
    """The ends of the spectrum and the trace of a model that is as large as GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    text = "".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))).encode()
    tokens = torch.tensor(list(text[: 64 * options.texts])).view(options.texts, 64)

    def next_token(logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over all tokens but the first of each text."""
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    loss = hvpspec.Loss(next_token, weight=lambda _, labels: labels[:, 1:].numel())
    H = HessianOperator(model, loss, {"input_ids": tokens, "labels": tokens})
    results = Results(
        options.out / "gpt2.json",
        {
            "network": "GPT-2, random weights",
            "parameters": H.shape[0],
            "data": f"{options.texts} texts of 64 bytes from docs",
        },
    )
    results.write("point", {"loss": H.loss(), "gradient_norm": float(H.gradient().norm())})
    density(H, results, options, probes=1)
    hutchinson(H, results, options)


def density(
    H: HessianOperator, results: Results, options: argparse.Namespace, probes: int
) -> SpectralMeasure:
    """Run Lanczos with its basis on a disk."""
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        measure: SpectralMeasure = results.add(
            "density",
            H,
            lambda: hvpspec.spectral_measure(
                H,
                probes,
                options.steps,
                generator=torch.Generator().manual_seed(0),
                basis_folder=folder,
            ),
        )
    facts = measure_to_dict(measure)
    results.write("density", {name: facts[name] for name in ("bulk", "bottom", "top", "norm")})
    measure.save(options.out / f"measure-{H.shape[0]}.npz")
    return measure


def hutchinson(H: HessianOperator, results: Results, options: argparse.Namespace) -> None:
    """Estimate the trace in the memory of two vectors."""
    found = results.add(
        "trace",
        H,
        lambda: hvpspec.trace(
            H,
            options.samples,
            method="hutchinson",
            generator=torch.Generator().manual_seed(0),
            block_size=2,
        ),
    )
    results.write("trace", {"value": found.value, "sem": found.sem})


WHAT: dict[str, Callable[[argparse.Namespace], None]] = {
    "resnet18": of_resnet18,
    "gpt2": of_gpt2,
}


if __name__ == "__main__":
    main()
