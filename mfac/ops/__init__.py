"""The operations on the Fisher: compiled, in plain PyTorch, and the choice between the two.

One function per op, with the same signature in :mod:`mfac.ops.compiled` and :mod:`mfac.ops.reference`.

Shapes: ``grads`` [m, d] float32 or bfloat16, one gradient per row; ``damping`` λ > 0
of F = λ I + (1/m) Gᵀ G; ``block_size`` B >= 1, F being block-diagonal with blocks of B columns; ``active`` [d]
bool, columns that take part, the others counting as zero gradients; ``kept`` [d] bool, False = pruned. Wrong
arguments raise ValueError or TypeError from the op itself.

``precision`` of the large matrix products: ``"highest"``, the results of the reference to four digits at least;
``"high"``, numbers as sums of two bfloat16 on the tensor cores of a GPU or the AMX unit of a CPU, some three digits at
a moderate damping; ``"medium"``, one bfloat16, some two. A lower precision is permitted, not required: CPUs without AMX
(``mfac doctor``: cpu_bf16), the reference, and blocks that are too ill-conditioned give the highest. bfloat16 gradients
are exact numbers, and their products take the fast instructions in any precision.
"""
