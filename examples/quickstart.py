"""Train a small network on bundled images, then count and draw the directions that go down.

Run it with ``python examples/quickstart.py [FOLDER]``; pictures go to FOLDER (default: out).
"""

import sys
from pathlib import Path

import torch
from torch import nn

import hvpspec
from hvpspec.plotting import plot_index_curve, plot_spectrum, save_figure
from hvpspec.zoo import TrainingSettings, load_data, train


def main(folder: Path) -> None:
    """Do it all, and write two pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)

    # 1. A network and data. Any torch.nn.Module will do, and any (inputs, targets) or DataLoader.
    data = load_data("mnist-sample", subset=1000)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10), nn.ReLU(), nn.Linear(10, 10)
    )
    history = train(net, data, TrainingSettings(epochs=20, lr=0.2))
    print(f"trained to a loss of {history.loss:.3f}, accuracy {history.accuracy:.1%}")

    # 2. The Hessian of the mean loss over these data, at the trained weights.
    H = hvpspec.HessianOperator(net, nn.CrossEntropyLoss(), data.tensors)

    # 3. How many directions go down there?
    result = hvpspec.index(H)
    print(f"{result.index} of {result.dim} eigenvalues are below -{result.tau:.1e}")
    print(
        f"signs within the noise floor: {result.nullity} eigenvalues (raw count {result.raw_count})"
    )
    print(f"the gradient's norm is {result.gradient_norm:.2g}")
    bound = result.bound
    if bound is not None:
        print(f"at most {bound.upper} could go down. {bound.reason}")

    # 4. At other resolutions, from the same eigenvalues.
    curve = result.curve(torch.tensor([1e-4, 1e-3, 1e-2]))
    for tau, count in zip(curve.taus.tolist(), curve.counts.tolist(), strict=True):
        print(f"{count} eigenvalues are below -{tau:g}")

    # 5. One layer's own Hessian: alone, the last layer never goes down.
    block = hvpspec.index(H.block("4"))
    print(f"last layer alone: {block.index} of {block.dim}")

    # 6. Pictures.
    spectrum = plot_spectrum(
        result.eigenvalues, noise_floor=result.noise_floor, scale="both", title="49-10-10, ReLU"
    )
    save_figure(spectrum, folder / "spectrum.png")
    save_figure(plot_index_curve(result), folder / "index.png")
    print(f"wrote {folder / 'spectrum.png'} and {folder / 'index.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
