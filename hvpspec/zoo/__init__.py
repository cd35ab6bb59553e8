"""Networks, data sets, training and checkpoints.

The package contains small networks, data sets (with samples that need no download) and training
that is reproducible from its seed. A checkpoint contains a trained network and what is needed to
rebuild it; reading one never runs code that the file contains or names. Nothing here depends on
Hessians: the results are a network, a loss and data.
"""

from hvpspec.zoo.checkpoints import Checkpoint, TensorInfo, load_checkpoint, save_checkpoint
from hvpspec.zoo.datasets import (
    SAMPLES,
    Dataset,
    DataSource,
    cache_dir,
    load_data,
    source_files,
)
from hvpspec.zoo.networks import (
    ACTIVATIONS,
    NETWORKS,
    NetworkSpec,
    build_network,
    cnn,
    linear,
    mlp2,
    mlp3,
)
from hvpspec.zoo.training import (
    TrainingHistory,
    TrainingSettings,
    build_loss,
    check_fit,
    evaluate,
    train,
)

__all__ = [
    "ACTIVATIONS",
    "NETWORKS",
    "SAMPLES",
    "Checkpoint",
    "DataSource",
    "Dataset",
    "NetworkSpec",
    "TensorInfo",
    "TrainingHistory",
    "TrainingSettings",
    "build_loss",
    "build_network",
    "cache_dir",
    "check_fit",
    "cnn",
    "evaluate",
    "linear",
    "load_checkpoint",
    "load_data",
    "mlp2",
    "mlp3",
    "save_checkpoint",
    "source_files",
    "train",
]
