"""Second-order pruning for PyTorch: Optimal Brain Surgeon with an empirical Fisher (M-FAC), fast.

Importing compiles nothing; the kernels are built at first use.
"""

from mfac.batchnorm import reestimate_batchnorm
from mfac.collect import collect_gradients
from mfac.fisher import Fisher
from mfac.frontier import Frontier, frontier
from mfac.gradients import GradientBuffer
from mfac.one_shot import prune
from mfac.parameters import prunable_parameters
from mfac.pruner import Pruner
from mfac.result import PruneResult
from mfac.schedule import Schedule
from mfac.step import prune_step

__version__ = "0.1.0"

__all__ = [
    "Fisher",
    "Frontier",
    "GradientBuffer",
    "PruneResult",
    "Pruner",
    "Schedule",
    "collect_gradients",
    "frontier",
    "prunable_parameters",
    "prune",
    "prune_step",
    "reestimate_batchnorm",
]
