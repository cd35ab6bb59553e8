"""Hessians of networks with 11 and 124 million parameters, on a machine with two cores.

- ``resnet18``: ResNet-18 for images of 32 x 32, trained on the bundled sample of Fashion-MNIST
  (padded, in three channels): density, a few eigenvalues at both ends, trace, and the certified
  index at coarser and finer resolutions, as far down as the products reach.
- ``gpt2``: a language model of GPT-2's size with random weights, on this project's own
  documentation byte by byte: the ends of the spectrum, by Lanczos with its basis on a disk, and the
  trace. Needs the package transformers.

Each answer is written as it is found; what stands in the folder of results is not asked again. In
the end ``large.md`` there is made of all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvpspec
from benchmarks.measuring import machine
from benchmarks.networks import resnet18
from hvpspec import GGNOperator, HessianOperator, SpectralMeasure, SymmetricOperator
from hvpspec.plotting import plot_density, save_figure
from hvpspec.zoo import Dataset, TrainingSettings, load_data, train

ROOT = Path(__file__).parents[1]

#: Questions and answers are words, the rest are numbers.
ALIGNED = (":--", ":--", "--:", "--:", "--:")
#: Resolutions of the ladder, in units of the largest eigenvalue.
RATIOS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


class Results:
    """What was found, in a file that grows, with the seconds and products that each took.

    Args:
        path: the JSON file; what it holds is kept, if it is about the same.
        about: what it is about.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._content = path, {**about, "machine": machine("float32")}
        if path.exists():
            before = json.loads(path.read_text())
            if any(before.get(name) != value for name, value in about.items()):
                raise SystemExit(f"{path} is about something else; choose another --out")
            self._content = before

    def once(
        self, name: str, A: SymmetricOperator, ask: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Ask a question, unless it was asked before, and write down the answer and what it took.

        Args:
            name: of the answer.
            A: whose products are counted.
            ask: returns the fields of the answer.
        """
        if name not in self._content:
            before, start = A.num_matvecs, time.perf_counter()
            answer = ask()
            took = {
                "seconds": round(time.perf_counter() - start, 1),
                "products": A.num_matvecs - before,
                # Of the process so far: on Linux in units of 1,024 bytes.
                "peak_gigabytes": round(getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
            }
            self._content[name] = took | answer
            self._path.write_text(json.dumps(self._content, indent=1) + "\n")
            print(f"{name}: {took}", flush=True)
        found: dict[str, Any] = self._content[name]
        return found


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
    write_page(options.out)


def of_resnet18(options: argparse.Namespace) -> None:
    """Train ResNet-18 a little, and ask all there is to ask."""
    data = load_data("fashion-mnist-sample")
    images, labels = data.tensors
    images = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    settings = TrainingSettings(epochs=options.epochs, lr=0.02, momentum=0.9, batch_size=64)
    torch.manual_seed(0)
    model, weights = resnet18(), options.out / f"resnet18-{options.epochs}.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights))
    else:
        train(model, Dataset(data.name, images, labels), settings)
        torch.save(model.state_dict(), weights)
    chosen = slice(0, options.images)
    problem = model.eval(), nn.CrossEntropyLoss(), (images[chosen], labels[chosen])
    H, G = HessianOperator(*problem), GGNOperator(*problem)
    about = {
        "network": "ResNet-18 for images of 32 x 32",
        "parameters": H.shape[0],
        "data": f"first {options.images} images of {data.name}",
        "training": asdict(settings),
    }
    results = Results(options.out / "resnet18.json", about)
    results.once("point", H, lambda: point(H))
    title = f"ResNet-18, {H.shape[0]:,} parameters, {options.images} images"
    density(H, results, options, probes=2, name="resnet18", title=title)

    def extremes() -> dict[str, Any]:
        """Two eigenvalues from each end."""
        pairs = hvpspec.eigsh(H, 4, "BE", tol=1e-2, max_matvecs=options.most)
        norms = pairs.residual_norms.tolist()
        return {"values": pairs.values.tolist(), "residual_norms": norms}

    largest = results.once("extremes", H, extremes)["values"][-1]
    results.once("trace", H, lambda: hutchinson(H, options))
    results.once("Gauss-Newton trace", G, lambda: hutchinson(G, options))

    def index() -> dict[str, Any]:
        """The certified index, from coarse to fine."""
        taus = [ratio * largest for ratio in RATIOS]
        found = hvpspec.index(
            H,
            taus[-1],
            tau_ladder=taus[:-1],
            method="certified",
            confidence=0.95,
            generator=torch.Generator().manual_seed(0),
            max_matvecs=options.most,
        )
        rungs = [asdict(r) | {"ratio": x} for x, r in zip(RATIOS, found.ladder, strict=True)]
        return {"ladder": rungs, "noise_floor": found.noise_floor, "confidence": 0.95}

    results.once("index", H, index)


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
    problem = model, loss, {"input_ids": tokens, "labels": tokens}
    H, G = HessianOperator(*problem), GGNOperator(*problem)
    about = {
        "network": "GPT-2, random weights",
        "parameters": H.shape[0],
        "data": f"{options.texts} texts of 64 bytes from docs",
    }
    results = Results(options.out / "gpt2.json", about)
    results.once("point", H, lambda: point(H))
    title = f"GPT-2, {H.shape[0]:,} parameters, random weights, {options.texts} x 64 bytes"
    density(H, results, options, probes=1, name="gpt2", title=title)
    results.once("trace", H, lambda: hutchinson(H, options))
    # The other part of the Hessian has as many eigenvalues on either side of 0, which no sample of
    # the trace of the whole sees through.
    results.once("Gauss-Newton trace", G, lambda: hutchinson(G, options))


def point(H: HessianOperator) -> dict[str, Any]:
    """Where it is."""
    return {"loss": H.loss(), "gradient_norm": float(H.gradient().norm())}


def density(
    H: HessianOperator,
    results: Results,
    options: argparse.Namespace,
    *,
    probes: int,
    name: str,
    title: str,
) -> None:
    """Run Lanczos with its basis on a disk, and draw what it saw."""

    def measure() -> dict[str, Any]:
        """The ends of the spectrum."""
        with tempfile.TemporaryDirectory(dir=options.out) as folder:
            measure = hvpspec.spectral_measure(
                H,
                probes,
                options.steps,
                generator=torch.Generator().manual_seed(0),
                basis_folder=folder,
            )
        measure.save(options.out / f"{name}.npz")
        save_figure(plot_density(measure, symlog=True, title=title), options.out / f"{name}.png")
        facts = measure.to_dict()
        return {field: facts[field] for field in ("bulk", "bottom", "top", "norm")}

    results.once("density", H, measure)
    results.once("ends", H, lambda: ends(SpectralMeasure.load(options.out / f"{name}.npz")))


def ends(measure: SpectralMeasure) -> dict[str, Any]:
    """The outermost Ritz values of each probe: there is an eigenvalue within each residual."""
    found = []
    for run in measure.runs:
        ritz, vectors = torch.linalg.eigh(run.T)
        round_off = torch.finfo(measure.dtype).eps / 2 * float(ritz.abs().max())
        residuals = (run.betas[-1] * vectors[-1].abs()).clamp(min=round_off)
        found.append({"ritz": ritz[[0, -1]].tolist(), "residuals": residuals[[0, -1]].tolist()})
    return {"probes": found}


def hutchinson(A: SymmetricOperator, options: argparse.Namespace) -> dict[str, Any]:
    """Estimate a trace in the memory of a few vectors."""
    found = hvpspec.trace(
        A,
        options.samples,
        method="hutchinson",
        generator=torch.Generator().manual_seed(0),
        block_size=2,
    )
    return {"value": found.value, "sem": found.sem}


def write_page(out: Path) -> None:
    """Make ``large.md`` of all results in a folder."""
    parts = []
    for path in sorted(out.glob("*.json")):
        found = json.loads(path.read_text())
        title = f"{found['network']}: {found['parameters']:,} parameters"
        rows = [
            (
                question,
                answer(found[question]),
                str(found[question]["products"]),
                f"{found[question]['seconds']:,.0f}",
                f"{found[question].get('peak_gigabytes', '–')}",
            )
            for question, answer in ANSWERS.items()
            if question in found
        ]
        machine = found["machine"]
        note = (
            f"Hessian of the mean loss over the {found['data']}, in {machine['dtype']} on"
            f" {machine['threads']} thread(s); GB: the most memory of the process so far, with what"
            " the system holds of a basis on the disk. ±: for eigenvalues a bound on the error, for"
            " traces a standard error."
        )
        headings = ("question", "answer", "products", "seconds", "GB")
        parts.append(f"## {title}\n\n{note}\n")
        parts += [f"| {' | '.join(row)} |" for row in (headings, ALIGNED, *rows)]
        parts.append("")
        if (out / f"{path.stem}.png").exists():
            parts.append(f"![Density of {found['network']}]({path.stem}.png)\n")
    (out / "large.md").write_text("\n".join(parts))


def the_point(found: dict[str, Any]) -> str:
    """Loss and gradient."""
    return f"loss {found['loss']:.4g}, ‖∇f‖ {found['gradient_norm']:.3g}"


def the_density(found: dict[str, Any]) -> str:
    """Bulk and outliers."""
    low, high = found["bulk"]
    counts = f"{len(found['bottom'])} outliers below, {len(found['top'])} above"
    return f"bulk [{low:.4g}, {high:.4g}], {counts}"


def the_ends(found: dict[str, Any]) -> str:
    """The outermost eigenvalues, from the probe that knows them best."""
    best = [min(found["probes"], key=lambda probe, i=i: probe["residuals"][i]) for i in (0, 1)]
    texts = [f"{one['ritz'][i]:.6g} ± {one['residuals'][i]:.1g}" for i, one in enumerate(best)]
    return f"λ min {texts[0]}, λ max {texts[1]}"


def the_extremes(found: dict[str, Any]) -> str:
    """Eigenvalues at both ends."""
    pairs = zip(found["values"], found["residual_norms"], strict=True)
    return ", ".join(f"{value:.6g} ± {norm:.1g}" for value, norm in pairs)


def the_trace(found: dict[str, Any]) -> str:
    """An estimate."""
    return f"{found['value']:.4g} ± {found['sem']:.2g}"


def the_index(found: dict[str, Any]) -> str:
    """Every rung."""
    return "; ".join(
        f"{rung['lower']:,}"
        + (f"–{rung['upper']:,}" if rung["upper"] > rung["lower"] else "")
        + f" below −{rung['ratio']:g} λ max"
        for rung in found["ladder"]
    )


#: How each answer is put into words.
ANSWERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "point": the_point,
    "density": the_density,
    "ends": the_ends,
    "extremes": the_extremes,
    "trace": the_trace,
    "Gauss-Newton trace": the_trace,
    "index": the_index,
}

WHAT: dict[str, Callable[[argparse.Namespace], None]] = {
    "resnet18": of_resnet18,
    "gpt2": of_gpt2,
}


if __name__ == "__main__":
    main()
