"""GatedModule: a gated batch-normalised network, whose fixed gates stand where the ReLU decides for itself."""

from __future__ import annotations

import torch
from torch import nn


class GatedModule(nn.Module):
    """``output(opened(x) * hidden(x))``, open where ``(x - mean)'gates + gate_offsets >= 0``.

    The gates are buffers, not trained, and in float64 as ``to_module`` makes them: rounding must not open or close
    one. Rows exactly on a gate's hyperplane may fall on either side of it.

    Parameters
    ----------
    hidden, output : torch.nn.Module
        Linear and batch norm, or one folded Linear, d to m features; and the last Linear, m to K.
    mean, gates, gate_offsets : Tensor (d,), (d, m), (m,)
        A gate for each of the m neurons.

    Examples
    --------
    >>> hidden, output = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1, bias=False)
    >>> GatedModule(hidden, output, torch.zeros(2), torch.ones(2, 3), torch.zeros(3))(torch.ones(4, 2)).shape
    torch.Size([4, 1])
    """

    mean: torch.Tensor
    gates: torch.Tensor
    gate_offsets: torch.Tensor

    def __init__(
        self,
        hidden: nn.Module,
        output: nn.Module,
        mean: torch.Tensor,
        gates: torch.Tensor,
        gate_offsets: torch.Tensor,
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.output = output
        self.register_buffer("mean", mean)
        self.register_buffer("gates", gates)
        self.register_buffer("gate_offsets", gate_offsets)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs: (n, d) -> (n, K)."""
        opened = (x.to(self.gates.dtype) - self.mean) @ self.gates + self.gate_offsets >= 0
        response = self.hidden(x)
        outputs: torch.Tensor = self.output(torch.where(opened, response, torch.zeros_like(response)))
        return outputs
