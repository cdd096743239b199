"""What exact ReLU training reaches, and how fast, beside its peers: one run, one thread, CPU seconds, ratios.

Usage: python benchmarks/exact.py [--rows E1,E2,E3] [--seed 0 [1 ...]] [--inits 10] [--time-limit 60] [--json FILE]

Ours is ``ConvexBNRegressor(activation="relu")`` with a time limit for solver and proof together; its seconds to the
objective end with the solver's first report of the last objective, the rest is the search for better and the proof.
Against it: CVXPY with Clarabel on all patterns (E1), Adam and SGD of torch from many starts, and Clarabel on the
patterns of one trained network (E2, E3).
Every objective is recomputed in float64 from the raw data by judge.py. benchmarks/bounds.py measures the bounds where
branch and bound cannot reach. Takes about twenty minutes a seed.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy and scipy are loaded, below
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAYON_NUM_THREADS"] = "1"  # Clarabel's

import argparse
import json
import platform
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from convexbn import ConvexBNRegressor, Status
from convexbn.program.arrangement import enumerate_patterns
from convexbn_studies.study import PAPER
from descent import TRAINERS, train
from gated import processor
from instances import RELU_SHAPES, relu_instance
from judge import Network, from_whitened, network_objective
from peers import clarabel_relu

TOLERANCE = 1e-6
SAME = 1e-6  # relative difference of objectives that counts as none
REPEATS = 3  # of ours on E1, whose seconds are few
FRACTIONS = {"E1": (0.1, 0.02), "E2": (0.1, 0.05), "E3": (0.1, 0.05)}
ANY = float("inf")
LARGEST_GAPS = {  # estimated and valid
    ("E1", 0.1): (ANY, 1e-6), ("E1", 0.02): (ANY, 1e-6), ("E2", 0.1): (1e-5, 1e-2), ("E2", 0.05): (1e-5, ANY),
    ("E3", 0.1): (ANY, ANY), ("E3", 0.05): (ANY, ANY),
}  # fmt: skip
AT_LEAST = {"E1": 60, "E2": 1, "E3": 0.5}  # peer's CPU seconds over ours


@dataclass(frozen=True)
class Ours:
    """One fit of ours.

    Attributes
    ----------
    seconds, proof_seconds : float
        CPU seconds to the objective, and of the proof.
    objective : float
        As the judge recomputes it.
    estimated_gap, valid_gap : float
        Relative gaps of the certificate.
    bound, status : str
        What gave the valid bound, and what is proved.
    neurons : int
    reports : list of (float, float)
        CPU seconds and objective at each report of the solver.
    """

    seconds: float
    proof_seconds: float
    objective: float
    estimated_gap: float
    valid_gap: float
    bound: str
    status: str
    neurons: int
    reports: list

    def seconds_to(self, objective):
        """Return the CPU seconds after which the solver was no higher than an objective, infinite if it never was."""
        return first_at(self.reports, objective)


@dataclass(frozen=True)
class Peer:
    """A peer on the same instance.

    Attributes
    ----------
    name : str
    seconds : float
        CPU seconds, of the median run where there are several.
    objectives : list of float
        As the judge recomputes them.
    our_seconds : float
        Ours until no higher than the lowest of these; with the proof where ours must be certified.
    at_least : float or None
        What is asked of the ratio.
    certified : bool
        Whether ours is, where it must be.
    """

    name: str
    seconds: float
    objectives: list
    our_seconds: float
    at_least: float | None = None
    certified: bool = True

    @property
    def ratio(self):
        """Return how many times faster ours was; 0 where it never came as low."""
        return self.seconds / self.our_seconds

    @property
    def verdict(self):
        """Return what is asked and whether it is met, in words."""
        if self.at_least is None:
            return ""
        return f"{self.at_least}, {'met' if self.certified and self.ratio >= self.at_least else 'MISSED'}"

    def above(self, objective):
        """Return the lowest objective relative to another: negative where the peer is better."""
        return min(self.objectives) / objective - 1


def first_at(reports, objective):
    """Return the seconds of the first report that is no higher than an objective, infinite if none is."""
    return next((seconds for seconds, value in reports if value <= objective * (1 + SAME)), float("inf"))


def ours(instance, time_limit):
    """Fit, prove, and judge."""
    started = time.process_time()
    reports = []
    model = ConvexBNRegressor(
        activation="relu", weight_decay=instance.weight_decay, tol=TOLERANCE, time_limit=time_limit, random_state=0,
        callback=lambda progress: reports.append((time.process_time() - started, float(progress.objective))), **PAPER,
    )  # fmt: skip
    model.fit(instance.X, instance.Y[:, 0])
    seconds = first_at(reports, reports[-1][1])
    total, proof, net = time.process_time() - started, model.certificate_, model.network_
    return Ours(
        seconds=seconds,
        proof_seconds=total - seconds,
        objective=network_objective(instance, Network(net.weight, net.gamma, net.shift, net.output)),
        estimated_gap=proof.estimated_gap,
        valid_gap=proof.relative_gap,
        bound=proof.bound,
        status=proof.status.value,
        neurons=net.n_neurons,
        reports=reports,
    )


def median_run(instance, time_limit, repeats):
    """Return the run of median CPU seconds."""
    runs = [ours(instance, time_limit) for _ in range(repeats)]
    return sorted(runs, key=lambda run: run.seconds + run.proof_seconds)[repeats // 2]


def all_patterns(instance, run, at_least):
    """Compare with Clarabel on every pattern, both signs; ours counts with its proof, which must close the gap."""
    started = time.process_time()
    patterns = enumerate_patterns(instance.A).patterns.T
    patterns = patterns[:, patterns.any(0)]  # a neuron that is nowhere open does nothing
    enumeration = time.process_time() - started
    signs = np.repeat([1.0, -1.0], patterns.shape[1])
    first, seconds = clarabel_relu(instance, np.hstack([patterns, patterns]), signs)
    value = network_objective(instance, from_whitened(instance, first, signs[:, None]))
    lower = run.objective <= value * (1 + SAME)
    name = f"Clarabel, {patterns.shape[1]} patterns (enumerated in {enumeration:.1f} s)"
    ours_all = run.seconds + run.proof_seconds if lower else float("inf")
    return Peer(name, seconds, [value], ours_all, at_least, run.status == Status.CERTIFIED)


def descents(instance, run, inits, at_least):
    """Yield the comparison with each trainer from several starts, and the network of its first."""
    for trainer in TRAINERS:
        runs = [train(instance, trainer, seed) for seed in range(inits)]
        objectives = [network_objective(instance, network) for network, _ in runs]
        objectives = [value if np.isfinite(value) else float("inf") for value in objectives]
        seconds = statistics.median(seconds for _, seconds in runs)
        name = f"{trainer.name}, best of {inits}"
        yield Peer(name, seconds, objectives, run.seconds_to(min(objectives)), at_least), runs[0]


def trained_patterns(instance, run, network, seconds):
    """Compare with Clarabel on the patterns and signs of one trained network; its seconds include the training."""
    patterns, signs = distinct_neurons(instance, network)
    first, solving = clarabel_relu(instance, patterns, signs)
    value = network_objective(instance, from_whitened(instance, first, signs[:, None]))
    name = f"Clarabel, {len(signs)} patterns of one trained network"
    return Peer(name, seconds + solving, [value], run.seconds_to(value))


def distinct_neurons(instance, network, negligible=1e-6):
    """Return the patterns (n, P) and signs (P,) of the neurons that matter, each pair once."""
    norms = np.hypot(network.gamma, network.shift) * np.abs(network.output[:, 0])
    live = norms > negligible * norms.max()
    response = instance.X @ network.weight[:, live]
    response -= response.mean(0)
    response *= network.gamma[live] / np.linalg.norm(response, axis=0)
    opened = response + network.shift[live] / np.sqrt(len(response)) >= 0
    pairs = np.unique(np.vstack([opened, network.output[live, 0] > 0]), axis=1)
    return pairs[:-1], np.where(pairs[-1], 1.0, -1.0)


def peers_of(name, instance, run, inits):
    """Yield the peers of an instance, each as soon as it is measured."""
    if name == "E1":
        yield all_patterns(instance, run, AT_LEAST[name])
    for peer, trained in descents(instance, run, inits, None if name == "E1" else AT_LEAST[name]):
        yield peer
        if name != "E1" and trained_on_time(peer):
            yield trained_patterns(instance, run, *trained)


def trained_on_time(peer):
    """Return whether a peer is the shortest training: the one whose network Clarabel polishes."""
    return peer.name.startswith(TRAINERS[0].name)


def print_ours(name, fraction, seed, run):
    """Print our line of an instance."""
    print(
        f"| {name} {fraction:4} seed {seed} | ours | {run.seconds:.2f} + proof {run.proof_seconds:.2f} "
        f"| {run.objective:.7g}, {run.neurons} neurons "
        f"| {run.status}: estimated {run.estimated_gap:.0e}, valid {run.valid_gap:.1e} ({run.bound}) "
        f"| | | {gaps_verdict(run, *LARGEST_GAPS[name, fraction])} |",
        flush=True,
    )


def gaps_verdict(run, estimated, valid):
    """Return the gaps that are asked for and whether they are met, in words."""
    if not np.isfinite([estimated, valid]).any():
        return ""
    asked = [f"{word} {gap:.0e}" for word, gap in (("est.", estimated), ("valid", valid)) if np.isfinite(gap)]
    met = run.estimated_gap <= estimated and run.valid_gap <= valid
    return f"{', '.join(asked)}, {'met' if met else 'MISSED'}"


def print_peer(peer, run):
    """Print the line of a peer."""
    print(
        f"| | {peer.name} | {peer.seconds:.2f} | {peer.above(run.objective):+.1e} | worst "
        f"{max(peer.objectives) / run.objective - 1:+.1e} | {peer.our_seconds:.2f} "
        f"| {peer.ratio:.2f} | {peer.verdict} |",
        flush=True,
    )


def measure(name, fraction, seed, inits, time_limit):
    """Measure one instance, print its lines, and return its figures."""
    instance = relu_instance(name, fraction, seed)
    run = median_run(instance, time_limit, REPEATS if name == "E1" else 1)
    print_ours(name, fraction, seed, run)
    peers = []
    for peer in peers_of(name, instance, run, inits):
        print_peer(peer, run)
        peers.append(peer)
    n, q = instance.A.shape
    return {
        "instance": name, "n": n, "q": q, "seed": seed, "fraction": fraction, "weight_decay": instance.weight_decay,
        "ours": asdict(run), "peers": [described(peer, run) for peer in peers],
    }  # fmt: skip


def described(peer, run):
    """Return the figures of a peer, None for what is infinite: a run that diverged, a value that was not reached."""
    figures = asdict(peer) | {"ratio": peer.ratio, "above": peer.above(run.objective), "verdict": peer.verdict}
    figures["objectives"] = [value if np.isfinite(value) else None for value in peer.objectives]
    figures["our_seconds"] = peer.our_seconds if np.isfinite(peer.our_seconds) else None
    return figures


def lowest_descent(figures):
    """Return the lowest end of any training relative to ours, over all instances: negative where it was better."""
    names = tuple(trainer.name for trainer in TRAINERS)
    return min(peer["above"] for row in figures for peer in row["peers"] if peer["name"].startswith(names))


def circumstances(asked):
    """Return what the figures depend on: command, versions, processor."""
    names = ("convexbn", "numpy", "scipy", "cvxpy", "clarabel", "torch")
    seeds = " ".join(map(str, asked.seed))
    return {
        "command": f"python benchmarks/exact.py --rows {','.join(asked.rows)} --seed {seeds} --inits {asked.inits} "
        f"--time-limit {asked.time_limit:g}",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "processor": processor(),
        "threads": 1,
    }


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(RELU_SHAPES), help="E1,E2,E3")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--inits", type=int, default=10, help="starts of each training")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds of ours, proof included")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where figures go")
    return parser.parse_args()


def warm_up():
    """Load what either side loads at its first use."""
    instance = relu_instance("E1", 0.3)
    ours(instance, 1.0)
    train(instance, TRAINERS[0], 0, width=2)


def main():
    """Measure, print the table, and write the figures after each instance."""
    asked = arguments()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warm_up()
    print("| on, of the largest | method | CPU s | objective; lowest above ours | | ours to there, s | ratio | asked |")
    print("|---|---|---|---|---|---|---|---|")
    figures = []
    for seed, name in ((seed, name) for seed in asked.seed for name in asked.rows):
        for fraction in FRACTIONS[name]:
            figures.append(measure(name, fraction, seed, asked.inits, asked.time_limit))
            asked.json.write_text(json.dumps(circumstances(asked) | {"rows": figures}, indent=1) + "\n")
    lowest = lowest_descent(figures)
    print(f"\nThe lowest end of any training: {lowest:+.1e} relative to ours (asked: no lower than {-SAME:.0e}).")


if __name__ == "__main__":
    main()
