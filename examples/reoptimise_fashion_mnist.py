"""Re-optimise the last two layers of a batch-normalised network that Adam trained on Fashion-MNIST.

    python examples/reoptimise_fashion_mnist.py

Three layers, 10,000 training images, 5,000 to choose by; needs the extra ``torch`` and the data set. All 55,000 images,
three seeds and tuned trainings: ``benchmarks/reoptimise.py``.
"""

import time

import torch

import convexbn
from convexbn.files.datasets import fashion_mnist

WEIGHT_DECAY = 0.5


def trained(X, y, epochs=10):
    """784 - 128 - 64 - 10 with batch norm, by Adam with a cosine decay of its rate."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(784, 128), torch.nn.BatchNorm1d(128), torch.nn.ReLU(),
        torch.nn.Linear(128, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(X)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(X[part]), y[part]).backward()
            optimizer.step()
        schedule.step()
    return module.eval()


def main():
    """Train, re-optimise, and print what changed."""
    data = fashion_mnist()
    X, X_test = (torch.tensor(images, dtype=torch.float32) / 255 for images in (data.X[:15_000], data.X_test))
    y, y_test = torch.tensor(data.y[:15_000]), torch.tensor(data.y_test)
    module = trained(X[:10_000], y[:10_000])
    started = time.perf_counter()
    new = convexbn.nn.reoptimise(
        module, X[:10_000], y[:10_000], X_val=X[10_000:], y_val=y[10_000:],
        loss="cross_entropy", weight_decay=WEIGHT_DECAY, max_iter=20,
    )  # fmt: skip
    print(f"{time.perf_counter() - started:.0f} s, step {new.step:.2f} of the way to the optimum")
    print(f"objective            {new.before.objective:9.1f} -> {new.after.objective:9.1f}")
    for name, images, labels in (("validation", X[10_000:], y[10_000:]), ("test", X_test, y_test)):
        with torch.no_grad():
            scores = [(net(images).argmax(1) == labels).float().mean().item() for net in (module, new.module.eval())]
        print(f"{name + ' accuracy':20} {scores[0]:9.4f} -> {scores[1]:9.4f}")


if __name__ == "__main__":
    main()
