"""Second-order pruning for PyTorch: Optimal Brain Surgeon with an empirical Fisher (M-FAC), fast on CPU.

Importing compiles nothing; the kernels are built at first use.
"""

from mfac.fisher import Fisher
from mfac.gradients import GradientBuffer, collect_gradients
from mfac.parameters import prunable_parameters
from mfac.prune import PruneResult, prune_step
from mfac.pruner import Pruner
from mfac.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "Fisher",
    "GradientBuffer",
    "PruneResult",
    "Pruner",
    "Schedule",
    "collect_gradients",
    "prunable_parameters",
    "prune_step",
]
