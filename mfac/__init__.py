"""Second-order pruning for PyTorch: Optimal Brain Surgeon with an empirical Fisher (M-FAC), fast.

Importing compiles nothing; the kernels are built at first use.
"""

from mfac import sparse
from mfac.distributed.cost import Cost, cost
from mfac.export.compressed import load_compressed, save_compressed
from mfac.export.onnx import export_onnx
from mfac.export.semi_structured import to_semi_structured
from mfac.export.verify import Verification, verify
from mfac.fisher import Fisher
from mfac.gradients.buffer import GradientBuffer
from mfac.gradients.collect import collect_gradients
from mfac.model.layers import register_layer
from mfac.model.targets import prunable_parameters
from mfac.pruning.batchnorm import reestimate_batchnorm
from mfac.pruning.frontier import Frontier, frontier
from mfac.pruning.gradual import Pruner
from mfac.pruning.iterative import prune
from mfac.pruning.masks import apply_masks
from mfac.pruning.result import PruneResult
from mfac.pruning.schedule import Schedule
from mfac.pruning.step import prune_step

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "Fisher",
    "Frontier",
    "GradientBuffer",
    "PruneResult",
    "Pruner",
    "Schedule",
    "Verification",
    "apply_masks",
    "collect_gradients",
    "cost",
    "export_onnx",
    "frontier",
    "load_compressed",
    "prunable_parameters",
    "prune",
    "prune_step",
    "reestimate_batchnorm",
    "register_layer",
    "save_compressed",
    "sparse",
    "to_semi_structured",
    "verify",
]
