"""Pictures of results; matplotlib is imported inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convexbn.certificate import Certificate
from convexbn.collapse import CollapseMetrics
from convexbn.solvers.solution import Progress


class CertificateDisplay:
    """Objective and lower bound over iterations: how a fit was proved.

    Parameters
    ----------
    history : sequence of Progress
        ``model.history_``.
    certificate : Certificate, optional
        ``model.certificate_``; its status and gap become the title.

    Attributes
    ----------
    figure_, axes_ : matplotlib objects
        Set by ``plot``.
    """

    def __init__(self, history: Sequence[Progress], certificate: Certificate | None = None) -> None:
        self.history = list(history)
        self.certificate = certificate

    @classmethod
    def from_estimator(cls, model: Any) -> CertificateDisplay:
        """Display of a fitted ``ConvexBNClassifier`` or ``ConvexBNRegressor``."""
        return cls(model.history_, model.certificate_)

    def plot(self, axes: Any = None) -> CertificateDisplay:
        """Draw objective and bound (first of two axes) and the relative gap (second); returns self."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        iterations = [p.iteration for p in self.history]
        lower = [p.lower_bound for p in self.history]
        upper = [p.objective for p in self.history]
        axes[0].plot(iterations, upper, "o-", color="#b2182b", label="objective of the network")
        axes[0].plot(iterations, lower, "o-", color="#2166ac", label="lower bound of the best network")
        axes[0].fill_between(iterations, lower, upper, color="0.9")
        axes[0].set(xlabel="iteration", ylabel="objective")
        axes[0].legend(frameon=False)
        gaps = [max(p.relative_gap, 1e-16) for p in self.history]
        axes[1].semilogy(iterations, gaps, "o-", color="0.2", label="relative gap")
        if self.certificate is not None:
            axes[1].axhline(self.certificate.tolerance, color="0.6", ls="--", label="tolerance")
            gap = self.certificate.relative_gap
            axes[0].set_title(f"{self.certificate.status.value}: certified gap {gap:.1e}", fontsize=10)
        axes[1].set(xlabel="iteration", ylabel="relative gap")
        axes[1].legend(frameon=False)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.xaxis.get_major_locator().set_params(integer=True)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self


#: Panels of a ``CollapseDisplay``: title, and the measures in it with their names, the first in the first colour.
_PANELS = [
    ("NC1  variation within classes", {"within_class": "trace(S_W pinv(S_B)) / K"}),
    ("NC2  distance to a simplex", {"norm_variation": "norms", "angle_deviation": "angles"}),
    ("NC3  classifier and class means", {"duality_centred": "centred means", "duality_uncentred": "means"}),
    ("NC4  nearest class mean disagrees", {"disagreement": "share of samples"}),
]


class CollapseDisplay:
    """Neural collapse over the epochs of a training, with the values of the global optimum as dashed lines.

    Parameters
    ----------
    history : sequence of CollapseMetrics
        One an epoch.
    epochs : sequence of float, optional
        When they were taken; 1, 2, ... by default.
    optimum : CollapseMetrics, optional
        Values to compare with, such as ``collapse.optimal_collapse``.

    Attributes
    ----------
    figure_, axes_ : matplotlib objects
        Set by ``plot``.

    Examples
    --------
    >>> from convexbn.collapse import optimal_collapse
    >>> optimum = optimal_collapse([8, 8, 8, 8], 0.5, loss="squared")
    >>> CollapseDisplay([optimum, optimum], optimum=optimum).plot().axes_.shape  # doctest: +SKIP
    (4,)
    """

    def __init__(
        self,
        history: Sequence[CollapseMetrics],
        epochs: Sequence[float] | None = None,
        optimum: CollapseMetrics | None = None,
    ) -> None:
        self.history = list(history)
        self.epochs = list(range(1, len(self.history) + 1)) if epochs is None else list(epochs)
        self.optimum = optimum

    def plot(self, axes: Any = None) -> CollapseDisplay:
        """Draw one panel a measure on four axes; returns self."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
        for axis, (title, measures) in zip(axes, _PANELS, strict=True):
            for (measure, label), colour in zip(measures.items(), ("#2166ac", "#b2182b"), strict=False):
                values = [getattr(metrics, measure) for metrics in self.history]
                axis.plot(self.epochs, values, color=colour, label=label, zorder=3)
                if self.optimum is not None:
                    value = getattr(self.optimum, measure)
                    axis.axhline(value, color=colour, ls="--", lw=1, label=f"optimum {round(value, 12):.3g}")
            axis.set_title(title, fontsize=10)
            axis.set(xlabel="epoch")
            axis.set_ylim(bottom=-0.04 * axis.get_ylim()[1])
            axis.legend(frameon=False, fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        self.axes_, self.figure_ = axes, axes[0].figure
        return self
