"""Replace the last two layers of a deep network by the best there are, and watch its features collapse before.

A network of four layers is trained by Adam on 200 digits. Its features reach rank n - 1, so that the re-optimised
layers are the global optimum of the whole network, whatever the earlier layers: training can only approach it, and so
do its features. Prints a table and saves a picture in ``demo/``; takes a quarter of a minute.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from torch import nn

from convexbn.estimators.display import CollapseDisplay
from convexbn.files.datasets import digits
from convexbn.nn import reoptimise
from convexbn.training.neural_collapse import collapse_metrics, optimal_collapse

N, WIDTH, EPOCHS = 200, 256, 600
DECAY = 0.02  # of the optimiser, with a mean loss: DECAY * sqrt(N) against the sum
FOLDER = Path("demo")


def main() -> None:
    """Train, re-optimise, print, draw."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    data = digits()
    X, y = torch.tensor(data.X) / 16, torch.tensor(data.y)
    X_val, y_val, X, y = X[N:], y[N:], X[:N], y[:N]

    earlier = [nn.Linear(64, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    earlier += [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    tail = [nn.Linear(WIDTH, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10, bias=False)]
    module = nn.Sequential(*earlier, *tail)
    decayed = [*tail[1].parameters(), *tail[3].parameters()]
    others = [parameter for parameter in module.parameters() if all(parameter is not other for other in decayed)]
    optimiser = torch.optim.Adam([{"params": others}, {"params": decayed, "weight_decay": DECAY}], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)

    history, epochs = [], range(0, EPOCHS, 5)
    for epoch in range(EPOCHS):
        features = module[:-1](X)
        if epoch in epochs:
            history.append(collapse_metrics(features.detach().numpy(), data.y[:N], tail[3].weight.detach().numpy().T))
        optimiser.zero_grad()
        nn.functional.cross_entropy(tail[3](features), y).backward()
        optimiser.step()
        schedule.step()

    beta = DECAY * N**0.5
    # the optimum itself: with X_val and y_val validation accuracy would choose a point on the way to it
    result = reoptimise(module, X, y, loss="cross_entropy", weight_decay=beta)
    print(f"{'':14}{'objective':>12}{'neurons':>10}{'train':>8}{'validation':>12}")
    for name, found, net in (("Adam", result.before, module), ("re-optimised", result.after, result.module)):
        with torch.no_grad():
            validation = (net.eval()(X_val).argmax(dim=1) == y_val).double().mean().item()
        print(f"{name:14}{found.objective:12.6f}{found.n_neurons:10}{found.train_accuracy:8.3f}{validation:12.3f}")
    print(f"{result.certificate.status}: {result.certificate.sentence}")

    FOLDER.mkdir(exist_ok=True)
    optimum = optimal_collapse(np.bincount(data.y[:N]), beta, loss="cross_entropy")
    picture = FOLDER / "collapse.png"
    CollapseDisplay(history, list(epochs), optimum).plot().figure_.savefig(picture, dpi=110)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
