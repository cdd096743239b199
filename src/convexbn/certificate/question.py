"""The question that the judge answers: raw rows, a program on them, and the gap that counts as optimal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from convexbn._types import Float
from convexbn.certificate.status import Scope
from convexbn.data.rounding import NOTHING_CUT, CutByRounding
from convexbn.program.gated import GatedProgram
from convexbn.program.relu import ReluProgram


@dataclass(frozen=True, eq=False)
class Question:
    """Task of the judge, made from raw rows, never by a solver.

    Attributes
    ----------
    X, mean : ndarray (n, d) or PatchMatrix, ndarray (d,)
        Raw rows, and their weighted means as the patterns of the program used them.
    program : GatedProgram or ReluProgram
    tol : float
        Relative gap that counts as optimal.
    truncated : bool
        Whether the whitened rows leave out directions of the data.
    spectral_filter : ndarray (q - 1,) or None
        ``phi`` of rows ``A Phi``: the penalty is on ``||Phi^{-1} s||``.
    target_offset : float or ndarray (K,)
        What the program subtracts from the targets, and so from the output bias of a network.
    cut : CutByRounding
        What the whitened rows leave out because it may be rounding.
    stretch : float
        Factor of dual norms on the whitened rows, for their departure from orthonormal columns: ``Whitening.stretch``.
    """

    X: Any
    mean: Float
    program: GatedProgram | ReluProgram
    tol: float = 1e-6
    truncated: bool = False
    spectral_filter: Float | None = None
    target_offset: Float | float = 0.0
    cut: CutByRounding = NOTHING_CUT
    stretch: float = 1.0

    @property
    def rows(self) -> Any:
        """Whitened rows (N, q)."""
        return self._source.rows

    @property
    def readout(self) -> Any:
        """Map from hidden units to the inputs of the output layer."""
        return self._source.readout

    @property
    def row_weights(self) -> Float:
        """Weights of the rows (N,)."""
        return self.readout.row_weights(self.program.loss.weights)

    @property
    def scope(self) -> Scope:
        """Networks to compare with, in words."""
        restriction = " with this convolution and pooling" if self.readout.rows_per_case > 1 else ""
        if self.truncated:
            restriction += f" on the leading {self.rows.shape[1] - 1} directions of the data (rank)"
        if self.spectral_filter is not None:
            restriction += " with this spectral filter (weight decay of the filtered program)"
        if isinstance(self.program, GatedProgram):
            return Scope("these gates", restriction, self.program.norm.name, str(self.cut))
        return Scope("all patterns", restriction, exception=str(self.cut))

    @property
    def _source(self) -> Any:
        """Owner of rows and readout."""
        return self.program.operator if isinstance(self.program, GatedProgram) else self.program
