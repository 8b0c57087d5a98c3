"""Joint update and the diagonal of what is left, from one factor; the small matrices that are kept between steps."""

import oracle
import pytest
import torch
from oracle import BACKENDS, DAMPINGS, KINDS, SHAPES, TOLERANCE

import mfac
from mfac.ops import compiled as ops
from mfac.ops import memory, reference

CPU = oracle.DEVICE == "cpu" and not oracle.emulated()


def room(m, d, block_size, elements=None):
    """`gram` and `held` with room for every matrix of the Fisher side, or for so many elements."""
    width = min(block_size, d)
    order = min(5 * m // 4, width)
    elements = order * (order + 1) // 2 if elements is None else elements
    gram = torch.full((-(-d // width), 2 + elements), torch.nan, dtype=torch.float64)
    gram[:, 0] = 0
    return gram, torch.zeros(d, dtype=torch.bool)


def two_ops(kernels, grads, weights, kept, damping, block_size):
    loss = kernels.joint_update(grads, weights, kept, damping, block_size)
    return loss, kernels.inverse_diagonal(grads, damping, block_size, kept)


def sub_steps(d, count, share, seed=0):
    """Masks of which each keeps about `share` of the one before."""
    generator, kept = torch.Generator().manual_seed(seed), torch.ones(d, dtype=torch.bool)
    for _ in range(count):
        kept = kept & (torch.rand(d, generator=generator) < share)
        yield kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_two_ops_one_after_another(shape, kind, dtype, backend):
    """The same bits on the CPU (on CUDA other batches), at every density; with all pruned and with nothing pruned."""
    (m, d, block_size), kernels = shape, BACKENDS[backend]
    generator = torch.Generator().manual_seed(1)
    grads = oracle.gradients(m, d, kind).to(dtype)
    for damping in DAMPINGS:
        for density in (0.0, 0.3, 0.9, 1.0):
            weights, kept = torch.randn(d, generator=generator), torch.rand(d, generator=generator) < density
            exact, out = weights.clone(), weights.clone()
            right = two_ops(kernels, grads, exact, kept, damping, block_size)
            loss, diagonal = kernels.joint_step(grads, out, kept, damping, block_size)
            if CPU:
                assert torch.equal(out, exact) and torch.equal(diagonal, right[1]) and float(loss) == float(right[0])
            assert oracle.error(out, exact) < 1e-6 and float((diagonal / right[1] - 1).abs().max()) < 1e-6
            assert float(loss) == pytest.approx(float(right[0]), rel=1e-6)
            loss, nothing = kernels.joint_step(grads, weights, kept, damping, block_size, "highest", None, None, False)
            assert float(loss) == float(right[0]) and torch.equal(weights, exact) and len(nothing) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [*DAMPINGS, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_held_matrices_against_dense(shape, damping, kind):
    """Eight sub-steps that share them, from one side to the other: each is the step from the start, F dense."""
    m, d, block_size = shape
    grads, start = oracle.gradients(m, d, kind), torch.randn(d)
    dense = oracle.fisher(grads, damping, block_size)
    if not oracle.well_posed(dense):
        return
    weights, loss, carried = start.clone(), 0.0, room(m, d, block_size)
    for kept in sub_steps(d, 8, 0.8):
        increase, diagonal = ops.joint_step(grads, weights, kept, damping, block_size, "highest", *carried)
        loss += float(increase)
        step = oracle.joint_step(dense, start, kept)
        assert oracle.error(weights, start + step) < TOLERANCE["update"]
        exact = 0.5 * float(step @ dense @ step)
        gone = torch.where(kept, 0.0, start.double())
        assert abs(loss - exact) <= TOLERANCE["loss"] * max(exact, 1e-6 * 0.5 * float(gone @ dense @ gone))
        exact = torch.full((d,), 1 / damping, dtype=torch.float64)
        exact[kept] = oracle.inverse(dense[kept][:, kept]).diagonal()
        assert float((diagonal / exact - 1).abs().max()) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(65, 230, 100), (64, 129, 64), (200, 400, 128), (1, 9, 3)], ids=str)
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 10.0])
def test_held_matrices_against_none(shape, damping, dtype):
    """The factor has the same bits, hence the diagonal; updates differ by rounding. Also with room for some only.

    At a low damping, matrices that were held when float64 products were needed go on being used.
    """
    m, d, block_size = shape
    grads, start = oracle.gradients(m, d).to(dtype), torch.randn(d)
    for elements in (None, 0, 800):
        carried, weights, anew = room(m, d, block_size, elements), start.clone(), start.clone()
        for kept in sub_steps(d, 8, 0.75, seed=1):
            loss, diagonal = ops.joint_step(grads, weights, kept, damping, block_size, "highest", *carried)
            right, exact = ops.joint_step(grads, anew, kept, damping, block_size)
            if damping == 10:
                assert torch.equal(diagonal, exact)
            assert oracle.error(diagonal, exact) < TOLERANCE["diagonal"]
            assert oracle.error(weights, anew) < (1e-6 if damping == 10 else TOLERANCE["update"])
            assert float(loss) == pytest.approx(float(right), rel=1e-4, abs=1e-12)


@pytest.mark.skipif(not CPU, reason="the CUDA ops keep nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_held_matrices_are_used(dtype):
    """Once a block is held, its gradients are not read: here they are lost."""
    grads, weights = oracle.gradients(120, 200).to(dtype), torch.randn(200)
    carried, masks = room(120, 200, 100), list(sub_steps(200, 3, 0.7))
    ops.joint_step(grads, weights, masks[0], 1.0, 100, "highest", *carried)
    assert torch.equal(carried[1], masks[0]) and bool((carried[0][:, 0] > 0).all())
    expected = weights.clone()
    ops.joint_step(grads, expected, masks[1], 1.0, 100)
    ops.joint_step(torch.full_like(grads, torch.nan), weights, masks[1], 1.0, 100, "highest", *carried)
    assert oracle.error(weights, expected) < 1e-6


@pytest.mark.parametrize("m", [8, 40])
def test_weights_that_are_not_held(m):
    """Masks that grow again, and weights that are not zero outside: made anew, not made up."""
    grads, carried = oracle.gradients(m, 60), room(m, 60, 30)
    for kept in (torch.arange(60) % 2 == 0, torch.arange(60) % 3 != 0, torch.arange(60) % 6 != 0):
        weights = torch.randn(60)
        expected = weights.clone()
        _, exact = reference.joint_step(grads, expected, kept, 1e-2, 30)
        _, diagonal = BACKENDS["compiled"].joint_step(grads, weights, kept, 1e-2, 30, "highest", *carried)
        assert oracle.error(weights, expected) < TOLERANCE["update"]
        assert oracle.error(diagonal, exact) < TOLERANCE["diagonal"]


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("shape", [(96, 1200, 300), (96, 5000, 5000), (300, 700, 100), (1500, 300, 300)], ids=str)
def test_same_bits_for_any_number_of_threads(shape, share, thread_counts):
    m, d, block_size = shape
    grads, results = oracle.gradients(m, d), []
    for _ in thread_counts():
        weights, carried, out = torch.linspace(-1, 1, d), room(m, d, block_size), []
        for kept in sub_steps(d, 3, share):
            out += ops.joint_step(grads, weights, kept, 1e-4, block_size, "highest", *carried)
        results.append([*out, weights])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("gram", "held", "error", "message"),
    [
        (None, torch.zeros(20, dtype=torch.bool), ValueError, "gram, held: expected both or none, got one"),
        (torch.zeros(3, 7).double(), torch.zeros(20), TypeError, "held: expected Bool, got Float"),
        (torch.zeros(2, 7).double(), torch.zeros(20, dtype=torch.bool), ValueError, r"gram: expected shape \[3, n\]"),
        (torch.zeros(3, 7), torch.zeros(20, dtype=torch.bool), TypeError, "gram: expected float64, got Float"),
        (torch.zeros(7, 3).double().T, torch.zeros(20, dtype=torch.bool), ValueError, "expected contiguous tensors"),
    ],
)
def test_wrong_memory(gram, held, error, message):
    weights = torch.randn(20)
    before = weights.clone()
    with pytest.raises(error, match=message):
        ops.joint_step(torch.randn(6, 20), weights, torch.arange(20) > 9, 1e-3, 8, "highest", gram, held)
    assert torch.equal(weights, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fisher(backend):
    """Active columns, and those that were not: kept they stay, pruned they cost ½ λ w²."""
    grads, active, kept = oracle.gradients(16, 60), torch.arange(60) % 5 != 0, torch.arange(60) % 2 == 0
    fisher = mfac.Fisher(grads, 1e-2, 25, active=active, backend=backend)
    weights = torch.randn(60)
    expected = weights.clone()
    loss, diagonal = fisher.replace(memory=fisher.step_memory()).joint_step(weights, kept)
    assert loss == fisher.joint_update(expected, kept) and torch.equal(weights, expected)
    torch.testing.assert_close(diagonal, fisher.replace(active=active & kept).inverse_diagonal())
    with pytest.raises(TypeError, match=r"kept: expected torch\.bool, got torch\.float32"):
        fisher.joint_step(weights, kept.float())


def test_memory_is_bounded(monkeypatch):
    fisher = mfac.Fisher(torch.randn(30, 100), 1e-2, 40)
    assert fisher.step_memory().gram.shape == (3, 2 + 37 * 38 // 2)  # 37 = 30 / (1 - kCancellation)
    monkeypatch.setattr(memory, "MAX_BYTES", 2000)
    assert 1500 < fisher.step_memory().gram.nbytes <= 2000
    monkeypatch.setattr(memory, "MAX_BYTES", 20)
    assert fisher.step_memory() is None
    assert mfac.Fisher(torch.randn(30, 100), backend="reference").step_memory() is None


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block4"])
@pytest.mark.parametrize("substeps", [2, 3, 8])
def test_prune_step(monkeypatch, substeps, pattern):
    """The masks are those of one op after the other, and the weights but for rounding."""
    grads, results = oracle.gradients(64, 1000), []

    def separately(self, weights, kept):
        return self.joint_update(weights, kept), self.replace(active=kept).inverse_diagonal()

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(mfac.Fisher, "step_memory", lambda self: None)
            monkeypatch.setattr(mfac.Fisher, "joint_step", separately)
        torch.manual_seed(0)
        model = torch.nn.Linear(50, 20, bias=False)
        result = mfac.prune_step(model, grads, 0.5, block_size=200, substeps=substeps, pattern=pattern)
        results.append((model.weight.detach(), result))
    assert torch.equal(results[0][1].masks["weight"], results[1][1].masks["weight"])
    assert oracle.error(results[0][0], results[1][0]) < 1e-6
    assert results[0][1].predicted_loss_increase == pytest.approx(results[1][1].predicted_loss_increase, rel=1e-6)
