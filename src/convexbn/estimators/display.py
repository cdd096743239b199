"""Pictures of results: ``plot`` imports matplotlib, draws, and sets ``axes_`` and ``figure_``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from convexbn._types import Float
from convexbn.certificate.certificate import Certificate
from convexbn.data.patches import PatchMatrix
from convexbn.data.preactivations import PreActivations
from convexbn.data.whitening import whiten
from convexbn.solvers.base import Progress
from convexbn.training.neural_collapse import CollapseMetrics

#: Two colours that all eyes tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00")

#: Measures below this are 0 but for rounding, and have no place on a logarithmic scale.
_ZERO = 1e-12


class _Display:
    """Base of the displays."""

    def _on(self, axes: Any, n_rows: int, n_columns: int, size: tuple[float, float]) -> Any:
        """Keep the given axes, or those of a new figure."""
        if axes is None:
            import matplotlib.pyplot as plt

            axes = plt.subplots(n_rows, n_columns, figsize=size, sharex=n_rows > 1, layout="constrained")[1].ravel()
        self.axes_, self.figure_ = axes, axes[0].figure
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        return axes


class CertificateDisplay(_Display):
    """Objective and lower bound over the iterations of a fit; of a ReLU fit the estimated bound, dashed.

    Parameters
    ----------
    history : sequence of Progress
        ``model.history_``.
    certificate : Certificate, optional
        ``model.certificate_``; its status and gap become the title.
    """

    def __init__(self, history: Sequence[Progress], certificate: Certificate | None = None) -> None:
        self.history, self.certificate = list(history), certificate

    @classmethod
    def from_estimator(cls, model: Any) -> CertificateDisplay:
        """Display of a fitted ``ConvexBNClassifier`` or ``ConvexBNRegressor``."""
        return cls(model.history_, model.certificate_)

    def plot(self, axes: Any = None) -> Self:
        """Draw objective and bound (first of two axes) and the relative gap (second); returns self."""
        axes = self._on(axes, 1, 2, (9, 3.6))
        iterations = [p.iteration for p in self.history]
        upper = [p.objective for p in self.history]
        axes[0].plot(iterations, upper, "o-", color="#b2182b", label="objective of the network")
        gaps = [max(p.estimated_gap, 1e-16) for p in self.history]
        if self.estimated:
            estimates = [p.lower_bound if p.estimated_bound is None else p.estimated_bound for p in self.history]
            axes[0].plot(iterations, estimates, "o:", color="0.5", mfc="none", label="estimated bound: no bound")
            axes[1].semilogy(iterations, gaps, "o:", color="0.5", mfc="none", label="estimated gap: no bound")
        else:
            lower = [p.lower_bound for p in self.history]
            axes[0].plot(iterations, lower, "o-", color="#2166ac", label="lower bound of the best network")
            axes[0].fill_between(iterations, lower, upper, color="0.9")
            axes[1].semilogy(iterations, gaps, "o-", color="0.2", label="relative gap")
        if (proof := self.certificate) is not None:
            self._draw_proof(axes, proof)
        for axis, unit in zip(axes, ("objective", "relative gap"), strict=False):
            axis.set(xlabel="iteration", ylabel=unit)
            axis.legend(frameon=False)
            axis.xaxis.get_major_locator().set_params(integer=True)
        return self

    @property
    def estimated(self) -> bool:
        """Whether the history has estimates in place of bounds."""
        return any(p.estimated_bound is not None for p in self.history)

    def _draw_proof(self, axes: Any, proof: Certificate) -> None:
        """Certified gap and tolerance, and beside estimates the bound that was proved."""
        axes[1].axhline(proof.tolerance, color="0.6", ls="--", label="tolerance")
        axes[0].set_title(f"{proof.status.value}: certified gap {proof.relative_gap:.1e}", fontsize=10)
        if self.estimated and np.isfinite(proof.lower_bound):
            axes[0].axhline(proof.lower_bound, color="#2166ac", label="lower bound of the best network")
            axes[1].axhline(max(proof.relative_gap, 1e-16), color="#2166ac", label="certified gap")


#: Panels of a ``CollapseDisplay``: title, scale, unit, and measures with their labels.
_PANELS = [
    ("NC1: variation within classes", "log", "trace(S_W pinv(S_B)) / K", {"within_class": "features"}),
    ("NC2: distance to a simplex", "log", "deviation", {"norm_variation": "norms", "angle_deviation": "angles"}),
    (
        "NC3: classifier against class means", "log", "distance, 0 to 2",
        {"duality_centred": "centred means", "duality_uncentred": "means as they are"},
    ),
    ("NC4: another class mean is nearer", "linear", "share of samples", {"disagreement": "features"}),
]  # fmt: skip


class CollapseDisplay(_Display):
    """Neural collapse over the epochs of a training, with the values of the global optimum as dashed lines.

    Parameters
    ----------
    history : sequence of CollapseMetrics
        One an epoch.
    epochs : sequence of float, optional
        The epochs of the history, 1, 2, ... by default.
    optimum : CollapseMetrics, optional
        Values to compare with, such as ``collapse.optimal_collapse``.
    """

    def __init__(
        self,
        history: Sequence[CollapseMetrics],
        epochs: Sequence[float] | None = None,
        optimum: CollapseMetrics | None = None,
    ) -> None:
        self.history, self.optimum = list(history), optimum
        self.epochs = list(range(1, len(self.history) + 1) if epochs is None else epochs)

    def plot(self, axes: Any = None) -> Self:
        """Draw one panel for each measure on four axes; returns self."""
        for axis, (title, scale, unit, measures) in zip(self._on(axes, 2, 2, (9, 6)), _PANELS, strict=True):
            for (measure, label), colour in zip(measures.items(), _COLOURS, strict=False):
                self._draw(axis, measure, label, colour)
            axis.set(title=title, xlabel="epoch", ylabel=unit, yscale=scale)
            axis.margins(y=0.25)  # room for the legend
            if scale == "linear":
                axis.set_ylim(-0.03, 1.05)
            axis.legend(frameon=False, loc="upper right")
        return self

    def _draw(self, axis: Any, measure: str, label: str, colour: str) -> None:
        """One measure over the epochs, and its value at the optimum."""
        if self.optimum is not None:
            if (value := getattr(self.optimum, measure)) > _ZERO:
                axis.axhline(value, color=colour, ls="--", lw=1.2)
            label += f" (dashed: optimum {value:.3g})" if value > _ZERO else " (optimum 0)"
        axis.plot(self.epochs, [getattr(metrics, measure) for metrics in self.history], color=colour, label=label)


class PathDisplay(_Display):
    """Certified gap, neurons and validation score over the weight decays of a path, one line for each rank.

    Parameters
    ----------
    points : sequence of PathPoint
        ``path.points``, or ``convexbn.estimators.path.load_path(file)``.
    """

    def __init__(self, points: Sequence[Any]) -> None:
        self.points = list(points)

    def plot(self, axes: Any = None) -> Self:
        """Draw the score, if there is one, the neurons and the gap, one above the other; returns self."""
        import matplotlib

        if not self.points:
            raise ValueError("there are no points to draw: ask the path for one at least.")
        scored = [point for point in self.points if point.score is not None]
        n_axes = 3 if scored else 2
        axes, colours = self._on(axes, n_axes, 1, (6, 2.2 * n_axes)), matplotlib.colormaps["viridis"]
        for i, (label, points) in enumerate(self._lines().items()):
            # from dark to light, which all eyes tell apart, and by marker
            style = {"color": colours((i * 0.22) % 0.9), "marker": "osv^D"[i % 5], "ms": 4, "lw": 1.2, "label": label}
            decays = [point.weight_decay for point in points]
            if scored:
                axes[0].plot(decays, [point.score for point in points], **style)
            axes[-2].plot(decays, [point.network.n_neurons for point in points], **style)
            gaps = [gap if (gap := point.certificate.relative_gap) > 0 else np.nan for point in points]
            axes[-1].plot(decays, gaps, **style)
        if scored:
            best = max(scored, key=lambda point: point.score)
            ring = {"ms": 12, "mfc": "none", "mec": "0.2", "clip_on": False, "label": f"best: {best.score:.4g}"}
            axes[0].plot(best.weight_decay, best.score, "o", **ring)
            axes[0].set(ylabel="validation score")
        axes[-1].axhline(self.points[0].certificate.tolerance, color="0.6", ls="--", label="tolerance")
        axes[-1].set(xscale="log", yscale="log", xlabel="weight decay", ylabel="relative gap")
        axes[-2].set(ylabel="neurons")
        axes[0].legend(frameon=False, fontsize=8, ncols=2)
        return self

    def _lines(self) -> dict[str, list[Any]]:
        """Points by rank, in order of appearance, each over rising weight decay."""
        lines: dict[str, list[Any]] = {}
        for point in self.points:
            lines.setdefault("all directions" if point.rank is None else f"rank {point.rank}", []).append(point)
        return {label: sorted(points, key=lambda point: point.weight_decay) for label, points in lines.items()}


class SpectrumDisplay(_Display):
    """Use of the data's spectrum by a fitted first layer: singular values above, energy of each direction below.

    The energy of direction ``i`` is ``sum_j ||c_j||^2 s_ij^2`` over the neurons, ``s_j`` being the first layer on
    the whitened data, as a share of its sum (mathematics, section 5).

    Parameters
    ----------
    singular_values : ndarray (r,)
        Of the centred data, largest first, in the units of the data, or of its standardised columns.
    energies : ndarray (r,)
        Share of the energy of every direction.
    rank : int
        Number of directions that the model keeps.
    tau : float or None, default=None
        Singular value at which the spectral filter is ``sqrt(1/2)``; None without a filter.
    standardized : bool, default=False
        Whether the columns were standardised.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from convexbn import ConvexBNClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> display = SpectrumDisplay.from_estimator(ConvexBNClassifier(rank=2, random_state=0).fit(X, y), X)
    >>> display.singular_values.shape, float(display.energies[2:].sum()) < 1e-20
    ((4,), True)
    """

    def __init__(
        self, singular_values: Float, energies: Float, rank: int, tau: float | None = None, standardized: bool = False
    ) -> None:
        self.singular_values, self.energies, self.rank, self.tau = singular_values, energies, rank, tau
        self.standardized = standardized

    @classmethod
    def from_estimator(cls, model: Any, X: Any, sample_weight: Any = None) -> SpectrumDisplay:
        """Display of a fitted estimator on its training rows.

        Parameters
        ----------
        model : ConvexBNClassifier or ConvexBNRegressor
        X, sample_weight : array-like
        """
        X = model._checked_rows(X)
        weights = np.ones(len(X)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        X, weights = X[weights > 0], weights[weights > 0]
        if model.convolution is not None:
            X = PatchMatrix(X, model.network_.convolution.geometry)
            weights = np.repeat(weights, X.geometry.n_locations)
        network, whitening = model.network_, whiten(X, weights, rank=X.shape[1], standardize=model.standardize)
        responses = PreActivations.compute(X, network.weight, weights, rank=model.rank_)
        coordinates = network.gamma * responses.products(whitening.rows, weights)
        energies = coordinates**2 @ (network.output**2).sum(axis=1)
        total = energies.sum()
        found = whitening.singular_values[: whitening.rank]
        tau = None if model._tau is None else model._tau * found[0]
        return cls(found, energies / total if total > 0 else energies, model.rank_, tau, model.standardize)

    def plot(self, axes: Any = None) -> Self:
        """Draw the spectrum with the cut, and the energies, on two axes; returns self."""
        axes, (spectrum, energy) = self._on(axes, 2, 1, (6, 4.8)), _COLOURS
        index = np.arange(1, len(self.singular_values) + 1)
        axes[0].plot(index, self.singular_values, color=spectrum)
        of = "standardised columns" if self.standardized else "units of the data"
        axes[0].set(yscale="log", ylabel=f"singular value\n({of})")
        if self.tau is not None:
            axes[0].axhline(self.tau, color="0.5", ls=":", label="filter: directions below are shrunk")
        shown = self.energies > _ZERO
        axes[1].vlines(index[shown], _ZERO, self.energies[shown], color=energy, lw=1)
        axes[1].plot(index[shown], self.energies[shown], ".", color=energy, ms=4)
        axes[1].set(xscale="log", xlabel="singular direction", ylabel="share of the first\nlayer's energy")
        if shown.any():
            axes[1].set(yscale="log", ylim=(0.5 * self.energies[shown].min(), 2 * self.energies[shown].max()))
        if cut := self.rank < len(index):
            label = f"cut: {self.rank} of {len(index)} directions"
            for axis in axes:
                axis.axvline(self.rank + 0.5, color="0.5", ls="--", label=label)
        if cut or self.tau is not None:
            axes[0].legend(frameon=False)
        return self
