"""ConvexLayer: the optimum of the gated program as a differentiable function of rows, targets and weight decay."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from convexbn.program.gated import GatedProgram, MaskedRows
from convexbn.program.gates import first_of_each_pattern
from convexbn.program.losses import LOSSES
from convexbn.program.output_bias import WithOutputBias
from convexbn.program.targets import are_soft_targets
from convexbn.solvers.gated.implicit_differentiation import Optimum, optimum_of

#: Margin below which a warning says that the derivative is that of one side.
_ON_THE_EDGE = 1e-9


class ConvexLayer(nn.Module):
    """Optimal outputs and weights of a gated batch-normalised network, differentiated through the optimum.

        min over S_1, ..., S_P, b   L(sum_i D_i A S_i + 1 b') + weight_decay * sum_i ||S_i||_F

    ``layer(rows, targets, weight_decay)`` solves the program to the limits of float64 and returns ``outputs`` (the
    shape of the targets) and ``weights`` (P, q, K). The backward pass differentiates its optimality conditions on the
    active groups: one Cholesky factor, made in the forward pass, serves all derivatives.

    The caller whitens the rows ``A``, with their constant column: by ``convexbn.data.whitening.whiten(X).rows``, or in
    torch for derivatives in the raw data. A spectral filter multiplies the columns of ``A``; the chain rule
    differentiates it.

    Parameters
    ----------
    patterns : array or Tensor (n, P) of bool
        Diagonals of the gates ``D_i``; a buffer. They stay fixed when the rows are differentiated.
    loss : {"squared", "logistic", "cross_entropy"}, default="squared"
        The Cholesky factor has the size ``n`` for the squared loss, ``n K`` for the others.
    fit_intercept : bool, default=True
        Whether the outputs have a bias ``b`` without penalty; ``optimum.bias`` holds it. The outputs contain it, and
        derivatives follow it.

    Attributes
    ----------
    optimum : convexbn.solvers.gated.implicit_differentiation.Optimum or None
        Optimum of the last call, from which the next one starts. Its ``residual``, ``margin`` and ``unique`` say how
        far its derivatives can be trusted.

    Raises
    ------
    ValueError
        For patterns of another shape or that repeat, an unknown loss, rows and targets that do not fit, and a weight
        decay that is not positive.
    FloatingPointError, numpy.linalg.LinAlgError
        From a call, if the program cannot be solved accurately enough to be differentiated.

    Warns
    -----
    RuntimeWarning
        From a backward pass. If a group is just becoming active or zero, the derivative is that of the side on which
        the active groups stay. If the optimal weights are not unique, theirs is the one of least norm; that of the
        outputs is right as long as the same groups stay active.

    Notes
    -----
    If the weight decay makes the zero network optimal, only the bias still follows the targets, and all else has the
    derivative zero. Derivatives are not differentiable again. The work is done in float64 on the CPU; results have the
    type and device of the rows. There is no layer for the ReLU program: its tight cone constraints would be further
    unknowns, and its optimum holds for the given patterns alone.

    References
    ----------
    Agrawal, Amos, Barratt, Boyd, Diamond, Kolter, "Differentiable convex optimization layers", NeurIPS 2019.

    Examples
    --------
    >>> from convexbn.data.whitening import whiten
    >>> X = np.random.default_rng(0).standard_normal((30, 3))
    >>> layer = ConvexLayer(X @ np.random.default_rng(1).standard_normal((3, 8)) >= 0)
    >>> weight_decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    >>> outputs, weights = layer(torch.tensor(whiten(X).rows), torch.tensor(X[:, 0] ** 2), weight_decay)
    >>> outputs.shape, weights.shape
    (torch.Size([30]), torch.Size([8, 4, 1]))
    >>> outputs.square().sum().backward()
    >>> bool(weight_decay.grad < 0)  # more weight decay, smaller outputs
    True
    """

    patterns: torch.Tensor
    optimum: Optimum | None

    def __init__(
        self, patterns: np.ndarray | torch.Tensor, loss: str = "squared", *, fit_intercept: bool = True
    ) -> None:
        super().__init__()
        self.loss, self.fit_intercept, self.optimum = loss, fit_intercept, None
        smooth = [name for name, kind in LOSSES.items() if kind.target_slope is not None]
        if loss not in smooth:
            raise ValueError(f"loss must be one of {', '.join(smooth)}, got {loss!r}.")
        gates = _numpy(torch.as_tensor(patterns)).astype(bool)
        if gates.ndim != 2 or not gates.size:
            raise ValueError(f"patterns must be rows x gates, got shape {gates.shape}.")
        if len(first_of_each_pattern(gates)) < gates.shape[1]:
            raise ValueError(
                "patterns repeat, so that the optimal weights are not unique: keep "
                "patterns[:, convexbn.program.gates.first_of_each_pattern(patterns)]."
            )
        self.register_buffer("patterns", torch.tensor(gates))

    def forward(
        self, rows: torch.Tensor, targets: torch.Tensor, weight_decay: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for the optimal outputs, of the shape of the targets, and weights (P, q, K).

        Parameters
        ----------
        rows : Tensor (n, q)
        targets : Tensor (n,) or (n, K)
            Numbers; in [-1, 1] for the logistic loss; rows of probabilities for cross-entropy.
        weight_decay : float or Tensor of one number
        """
        decay = torch.as_tensor(weight_decay, dtype=rows.dtype)
        program = self._program(rows, targets, decay)
        last = self.optimum
        fits = last is not None and last.groups.program.block_shape == program.block_shape
        self.optimum = optimum_of(program, last if fits else None)
        return _Differentiated.apply(rows, targets, decay, self.optimum)  # type: ignore[no-untyped-call]

    def _program(self, rows: torch.Tensor, targets: torch.Tensor, weight_decay: torch.Tensor) -> GatedProgram:
        """Program of a call, checked, in float64."""
        A, Y = _numpy(rows).astype(np.float64), _numpy(targets).astype(np.float64)
        n, beta = len(self.patterns), _numpy(weight_decay).astype(np.float64)
        if A.ndim != 2 or Y.ndim not in (1, 2) or len(A) != n or len(Y) != n:
            raise ValueError(f"rows and targets must have {n} rows, as the patterns, got {A.shape} and {Y.shape}.")
        if not (np.isfinite(A).all() and np.isfinite(Y).all()):
            raise ValueError("rows and targets must be finite: drop or impute the others.")
        if beta.size != 1 or not 0 < beta.item() < np.inf:
            raise ValueError(f"weight_decay must be one positive number, got {beta}.")
        kind, Y = LOSSES[self.loss], Y.reshape(n, -1)
        if not are_soft_targets(Y, self.loss):
            signs = kind.target_kind == "signs"
            asked = "targets between -1 and 1" if signs else "rows of probabilities as targets, such as one-hot rows"
            raise ValueError(f"the {self.loss.replace('_', '-')} loss takes {asked}.")
        bound = kind(Y, np.ones(n))
        if self.fit_intercept:
            bound = WithOutputBias.with_decay(bound, 0.0)
        return GatedProgram(MaskedRows(A, _numpy(self.patterns)), bound, beta.item())


def gated_outputs(rows: torch.Tensor, patterns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Outputs ``sum_i D_i A S_i`` (n, K) for any rows, without a bias, differentiable.

    Parameters
    ----------
    rows, patterns, weights : Tensor (n, q), (n, P), (P, q, K)
    """
    P, q, K = weights.shape
    opened = patterns.to(weights.dtype) @ weights.reshape(P, q * K)
    return torch.einsum("nq,nqk->nk", rows, opened.reshape(-1, q, K))


class _Differentiated(torch.autograd.Function):
    """An optimum that is already computed, as a node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, targets: torch.Tensor, weight_decay: torch.Tensor, optimum: Optimum
    ) -> Any:
        ctx.optimum, ctx.inputs = optimum, [(x.shape, x.dtype, x.device) for x in (rows, targets, weight_decay)]
        arrays = optimum.outputs.reshape(targets.shape), optimum.blocks
        return tuple(torch.tensor(array, dtype=rows.dtype, device=rows.device) for array in arrays)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, in_outputs: torch.Tensor, in_weights: torch.Tensor) -> Any:
        optimum: Optimum = ctx.optimum
        if optimum.margin < _ON_THE_EDGE:
            message = "a group is almost active or zero, so the derivative is that of one side: change weight_decay."
            warnings.warn(message, RuntimeWarning, stacklevel=1)
        if not optimum.unique:
            message = "the optimal weights are not unique, so theirs is one derivative of many: use the outputs alone."
            warnings.warn(message, RuntimeWarning, stacklevel=1)
        outputs = _numpy(in_outputs).astype(np.float64).reshape(optimum.outputs.shape)
        found = optimum.pullback(outputs=outputs, blocks=_numpy(in_weights).astype(np.float64))
        arrays = found.rows, found.targets, np.array(found.weight_decay)
        gradients = [
            torch.tensor(array.reshape(shape), dtype=dtype, device=device)
            for array, (shape, dtype, device) in zip(arrays, ctx.inputs, strict=True)
        ]
        return *gradients, None


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
