"""Adam and SGD of torch on the non-convex network, as a careful user would train it.

The network is trained in the whitened form ``sqrt(n) A``, where batch norm has become the identity: the same
functions and the same penalty as `BatchNorm1d` on the raw features with weight decay on its scale, its shift and the
output layer, a quarter cheaper a step, and as low or lower after equal steps. Full batches, the mean of
``(f - y)^2 / 2``, coupled weight decay ``weight_decay / sqrt(n)``, cosine decay of the rate, float32.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from judge import from_whitened

torch.set_num_threads(1)

WIDTH = 100


@dataclass(frozen=True)
class Trainer:
    """An optimiser and its schedule.

    Attributes
    ----------
    name : str
    optimiser : callable
        Of parameters and ``weight_decay``.
    rate : float
        Largest learning rate.
    steps : int
    warm_up : float
        Fraction of the steps over which the rate rises from zero.
    """

    name: str
    optimiser: Callable
    rate: float
    steps: int
    warm_up: float = 0.0

    def rate_at(self, step):
        """Return the learning rate of a step."""
        rise = min(1.0, (step + 1) / (self.warm_up * self.steps)) if self.warm_up else 1.0
        return self.rate * rise * (1 + math.cos(math.pi * step / self.steps)) / 2


def adam(parameters, weight_decay):
    """Return torch's Adam."""
    return torch.optim.Adam(parameters, weight_decay=weight_decay, fused=True)


def sgd(parameters, weight_decay):
    """Return torch's SGD with Nesterov momentum."""
    return torch.optim.SGD(parameters, momentum=0.97, nesterov=True, weight_decay=weight_decay, fused=True)


# Tuned on E1 to E3 among rates .003 to .3, momenta .9 and .97, 1,000 to 8,000 steps, with and without warm-up and
# batch norm: the shortest Adam that ends about 1e-4 above the lowest value of any, and the two that end lowest.
TRAINERS = (
    Trainer("Adam, 2,000 steps", adam, rate=0.1, steps=2000),
    Trainer("Adam, 8,000 steps", adam, rate=0.05, steps=8000),
    Trainer("SGD, 4,000 steps", sgd, rate=0.2, steps=4000, warm_up=0.1),
)


def train(instance, trainer, seed, width=WIDTH):
    """Train one network from a random start.

    Parameters
    ----------
    instance : ReluInstance
        The program.
    trainer : Trainer
    seed : int
        Seed of the start.
    width : int
        Number of neurons.

    Returns
    -------
    network : Network
        The network at the end, on the raw features.
    seconds : float
        CPU seconds of the training.
    """
    started = time.process_time()
    n, q = instance.A.shape
    net = random_network(q, width, seed)
    Z = torch.tensor(np.sqrt(n) * instance.A, dtype=torch.float32)
    y = torch.tensor(instance.Y, dtype=torch.float32)
    optimiser = trainer.optimiser(net.parameters(), weight_decay=instance.weight_decay / np.sqrt(n))
    for step in range(trainer.steps):
        for group in optimiser.param_groups:
            group["lr"] = trainer.rate_at(step)
        optimiser.zero_grad()
        (0.5 * torch.mean((net(Z) - y) ** 2)).backward()
        optimiser.step()
    seconds = time.process_time() - started
    first, output = (layer.weight.detach().double().numpy().T * n**0.25 for layer in (net[0], net[2]))
    return from_whitened(instance, first, output), seconds


def random_network(inputs, width, seed):
    """Return a ReLU network of one hidden layer without biases, outputs of about unit variance."""
    torch.manual_seed(seed)
    first, output = torch.nn.Linear(inputs, width, bias=False), torch.nn.Linear(width, 1, bias=False)
    torch.nn.init.normal_(first.weight, std=np.sqrt(2 / inputs))
    torch.nn.init.normal_(output.weight, std=np.sqrt(1 / width))
    return torch.nn.Sequential(first, torch.nn.ReLU(), output)
