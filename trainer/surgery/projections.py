"""Methods that are a short row of arithmetic on the Gramian, written so that nothing looks at a number.

They run where the Gramian lies: the host orders the operations and goes on, where a solver would have it wait. What is
random in them, the order of the projections, the host draws.
"""

from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import GradVacWeighting


def pcgrad(gramian: Tensor) -> Tensor:
    """Weights (T,) of PCGrad (Yu et al. 2020, algorithm 1) for a Gramian (T, T).

    For each task, c = e_i; for the others in a random order, c_j -= min(0, G_j c) / G_jj; the weights are the sum of
    all c. A task whose gradient is zero conflicts with none.
    """
    count, squares = len(gramian), gramian.diagonal()
    divisors = torch.where(squares > 0, squares, 1.0)
    units, weights = torch.eye(count, dtype=gramian.dtype, device=gramian.device), torch.zeros_like(squares)
    for i in range(count):
        c = units[i].clone()
        for j in torch.randperm(count).tolist():
            if j != i:
                c[j].sub_((gramian[j] @ c).clamp_max(0.0) / divisors[j])
        weights = weights + c
    return weights


class GradVac(GradVacWeighting):
    """Weights (T,) of Gradient Vaccine (Wang et al. 2021, algorithm 1) for a Gramian (T, T), as torchjd has it.

    Its targets move with a Gramian that is finite and of at least two tasks.
    """

    def forward(self, gramian: Tensor, /) -> Tensor:  # type: ignore[override]
        count, eps, beta = len(gramian), self.eps, self.beta
        self._ensure_state(count, gramian.dtype)
        state: Any = self._phi_t
        before: Tensor = state.to(gramian.device)
        targets = before.clone()
        each = torch.eye(count, dtype=gramian.dtype, device=gramian.device)
        norms = gramian.diagonal().clamp(min=0.0).sqrt()
        for i in range(count):
            products = each[i] @ gramian  # of what the task's gradient has become with all of them
            others = [j for j in range(count) if j != i]
            for j in (others[place] for place in torch.randperm(len(others)).tolist()):
                norm = (products * each[i]).sum().clamp(min=0.0).sqrt()
                cosine, target = products[j] / (norm * norms[j] + eps), before[i, j]
                sine, wanted = ((1.0 - value * value).clamp(min=0.0).sqrt() for value in (cosine, target))
                weight = norm * (target * sine - cosine * wanted) / (norms[j] * wanted + eps)
                weight = torch.where(cosine < target, weight, 0.0)
                each[i, j].add_(weight)
                products = products + weight * gramian[j]
                targets[i, j] = (1.0 - beta) * target + beta * cosine
        moves = gramian.isfinite().all() & ((gramian.diagonal() > 0).sum() > 1)
        self.register_buffer("_phi_t", torch.where(moves, targets, before))
        return each.sum(0)
