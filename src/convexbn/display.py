"""Pictures of results; matplotlib is imported inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convexbn.certificate import Certificate
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
