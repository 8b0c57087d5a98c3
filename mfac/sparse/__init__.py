"""Sparse inference: a pruned model that runs faster on this CPU than the dense one, inside PyTorch.

:func:`convert` replaces the layers that gain, :func:`save` and :func:`load` keep the compressed form. It consumes
zeros in weights, however they came about, and knows nothing of pruning. The kernels are an extension of their own,
compiled at the first use of this module.
"""

from mfac.sparse.convert import convert
from mfac.sparse.files import load, save
from mfac.sparse.report import ConversionReport, LayerReport

__all__ = ["ConversionReport", "LayerReport", "convert", "load", "save"]
