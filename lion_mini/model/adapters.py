"""Mixture of adapters with a router: section 3.1.2, equations (1) to (3).

Every feed-forward layer F of the frozen FlanT5 has K small adapters H_k beside it. Each learned one kind of task alone
(stage 1: image level, stage 2: region level). In stage 3 a router mixes them. It is nothing but gates: vectors as wide
as FlanT5, one per feed-forward layer, adapter and task, which multiply the adapter's output feature by feature:

    O = X + F(norm X) + sum_k gates[k][task] * H_k(X),    H(X) = scale * (W_up relu(W_down X + b) + b')

Stage 3 has as many adapters as tasks. A batch may mix tasks: `task` holds one row number per sample. A fresh stage 3:

    gates[0] = [[1, 1, ...],    gates[1] = [[0, 0, ...],    row 0: region level, listens to adapter 0 (stage 2's) only
                [0, 0, ...]]                [1, 1, ...]]    row 1: image level, listens to adapter 1 (stage 1's) only

Same outputs as the release's models/lion_adapters.py; the paper numbers the adapters the other way.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """Eq. (2): a bottleneck whose output is zero at initialisation."""

    def __init__(self, width: int, adapter_width: int):
        super().__init__()
        self.down = nn.Linear(width, adapter_width)
        self.up = nn.Linear(adapter_width, width)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:  # (b, t, d) -> (b, t, d)
        return self.up(F.relu(self.down(x))) * self.scale


def open_for_own_task(adapter: int, tasks: int, width: int) -> nn.Parameter:  # -> (task, d)
    gate = torch.zeros(tasks, width)
    gate[adapter] = 1.0
    return nn.Parameter(gate)


class MixtureOfAdapters(nn.Module):
    """The sum over k in eq. (3). One adapter (stages 1 and 2) has no gate; K adapters have gates (task, d), K tasks."""

    def __init__(self, width: int, adapter_width: int, count: int):
        super().__init__()
        self.adapters = nn.ModuleList(Adapter(width, adapter_width) for _ in range(count))
        self.gates = nn.ParameterList(open_for_own_task(k, count, width) for k in range(count) if count > 1)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:  # (b, t, d), (b,) -> (b, t, d)
        if not self.gates:
            return self.adapters[0](x)
        routed = (gate[task, None] * adapter(x) for gate, adapter in zip(self.gates, self.adapters, strict=True))
        return sum(routed, start=x.new_zeros(()))
