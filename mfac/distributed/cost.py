"""What a pruning step takes on several processes: memory, traffic and arithmetic, from formulas."""

from __future__ import annotations

from dataclasses import dataclass

from mfac.checks import check_int, check_number

_VECTORS = 6  # float32 [d] at a time: weights, weights before, scores, diagonal, and two while parts are gathered
_MASKS = 2  # bool [d] at a time: of before and after the step
_STATUS = 5 * 8  # bytes of a rank's report in a round of collecting: five float64 (ShardedBuffer.append_round)


@dataclass(frozen=True)
class Cost:
    """What one rank needs for one step; see :func:`cost`.

    Attributes:
        gradient_bytes: Memory of its columns of the gradients.
        vector_bytes: Memory of vectors as long as the weights, which every rank has whole, and of masks.
        sent_collecting: Bytes that it sends while the m gradients are collected.
        sent_stepping: Bytes that it sends in the step: d / W numbers of each vector, to each of the others.
        flops: Arithmetic of the step on its columns.
        seconds: Estimated time of the collection, the traffic and the step, in this order.
    """

    gradient_bytes: int
    vector_bytes: int
    sent_collecting: int
    sent_stepping: int
    flops: float
    seconds: tuple[float, float, float]

    @property
    def bytes(self) -> int:
        """Memory beside the model and its activations."""
        return self.gradient_bytes + self.vector_bytes


def cost(
    d: int,
    m: int = 256,
    world_size: int = 1,
    *,
    block_size: int | None = 512,
    substeps: int = 1,
    gradient_itemsize: int = 4,
    seconds_per_gradient: float = 0.0,
    bandwidth: float = 25e9,
    flops_per_second: float = 20e12,
) -> Cost:
    """Estimate what a step of ``prune_step`` takes on W processes that hold copies of a model (no group patterns).

    Columns are spread over the ranks: the gradients take m d / W numbers each, and each of the ⌈m / W⌉ rounds of
    collecting sends the (W - 1) / W of a row that other ranks own. A step of S sub-steps gathers 2 S vectors, of which
    each rank sends its d / W numbers to the W - 1 others. Its arithmetic is that of Gram matrix and triangular solve,
    2 m min(m, B) flops per weight and sub-step, and of an update, as many again in all. One block for all weights sends
    an m x m matrix of float64 more per factor.

    Args:
        d: Weights that are pruned.
        m: Gradients of all ranks together.
        world_size: W.
        block_size: B, or None.
        substeps: S.
        gradient_itemsize: Bytes per number of the gradients: 4, or 2 for bfloat16.
        seconds_per_gradient: Of one forward and backward pass on one rank.
        bandwidth: Bytes per second that a rank sends.
        flops_per_second: Rate of matrix products on a rank, in the precision that is used.

    Returns:
        The cost for the rank with the most columns.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range.

    Example:
        >>> found = cost(25_500_000, 256, 8)
        >>> f"{found.gradient_bytes / 1e9:.1f} GB, {found.sent_collecting / 1e9:.1f} GB sent"
        '3.3 GB, 2.9 GB sent'
    """
    d, m, size = check_int("d", d), check_int("m", m), check_int("world_size", world_size)
    substeps = check_int("substeps", substeps)
    itemsize = check_int("gradient_itemsize", gradient_itemsize, 2, 4)
    block = d if block_size is None else min(check_int("block_size", block_size), d)
    seconds_per_gradient = check_number("seconds_per_gradient", seconds_per_gradient, 0)
    bandwidth, rate = check_number("bandwidth", bandwidth, 1), check_number("flops_per_second", flops_per_second, 1)
    blocks = -(-d // block)
    columns = min(d, -(-d // size) if block == d else block * -(-blocks // size))
    rounds, others = -(-m // size), size - 1
    collecting = rounds * (itemsize * (d - d // size) + others * _STATUS)
    collecting = collecting if others else 0
    stepping = others * 4 * columns * 2 * substeps
    if block == d and others:
        stepping += others * 8 * (m * m * (substeps + 1) + m * 2 * substeps)
    flops = 2.0 * m * min(m, block) * columns * (2 * substeps)
    return Cost(
        gradient_bytes=itemsize * m * columns,
        vector_bytes=(4 * _VECTORS + _MASKS) * d,
        sent_collecting=collecting,
        sent_stepping=stepping,
        flops=flops,
        seconds=(rounds * seconds_per_gradient, (collecting + stepping) / bandwidth, flops / rate),
    )
