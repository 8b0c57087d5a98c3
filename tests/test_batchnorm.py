"""Re-estimation of BatchNorm statistics."""

import pytest
import torch
from torch import nn

import mfac


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(48, 4),
                         nn.BatchNorm1d(4, momentum=0.3))  # fmt: skip


def batches(count=5, value=1.0):
    generator = torch.Generator().manual_seed(1)
    return [(value * torch.randn(20, 2, 6, 6, generator=generator) + 2, None) for _ in range(count)]


def test_statistics_are_those_of_the_batches():
    """Mean over batches of mean and unbiased variance, layer after layer, with dropout off."""
    model = make_model().eval()
    mfac.reestimate_batchnorm(model, batches(), 5)
    inputs = torch.stack([model[0](x) for x, _ in batches()])
    torch.testing.assert_close(model[1].running_mean, inputs.mean((0, 1, 3, 4)))
    variance = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in inputs]).mean(0)
    torch.testing.assert_close(model[1].running_var, variance)
    # Downstream layers see what training would give them: batch statistics upstream.
    hidden = [nn.functional.batch_norm(x, None, None, model[1].weight, model[1].bias, True) for x in inputs]
    last = torch.stack([model[5](h.relu().flatten(1)) for h in hidden])
    torch.testing.assert_close(model[6].running_mean, last.mean((0, 1)))


def test_nothing_else_changes():
    model = make_model().train()
    model[3].eval()
    before = {name: x.clone() for name, x in model.state_dict().items() if "running" not in name}
    state = torch.get_rng_state()
    mfac.reestimate_batchnorm(model, batches(), 5)
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())  # num_batches_tracked among them
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, True, False, True, True, True]
    assert (model[1].momentum, model[6].momentum) == (0.1, 0.3)
    assert all(p.grad is None for p in model.parameters())


def test_batches_are_used_again():
    model, other = make_model(), make_model()
    mfac.reestimate_batchnorm(model, batches(2), 4)
    mfac.reestimate_batchnorm(other, batches(2), 2)
    torch.testing.assert_close(model[1].running_var, other[1].running_var)


def test_layers_that_are_not_run_stay_as_they_were():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.head = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.head(self.main(x)) if self.training else self.main(x)

    model = Auxiliary()
    model.head.running_mean.fill_(5)
    model.head.running_var.fill_(7)
    mfac.reestimate_batchnorm(model, batches(), 2)
    assert torch.equal(model.head.running_mean, torch.full((2,), 5.0))
    assert torch.equal(model.head.running_var, torch.full((2,), 7.0))
    assert float(model.main.running_mean[0]) == pytest.approx(2, abs=0.1)


def test_model_without_batchnorm():
    mfac.reestimate_batchnorm(nn.Linear(2, 2), [], 1)
    mfac.reestimate_batchnorm(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [], 1)


@pytest.mark.parametrize(
    ("given", "count", "error", "message"),
    [
        (batches(), 0, ValueError, "num_batches: expected an int >= 1, got 0"),
        (batches(), 1.5, TypeError, "num_batches: expected an int, got 1.5"),
        (None, 1, TypeError, "batches: expected an iterable"),
        ([], 1, ValueError, "batches: expected more batches, got none"),
        (iter(batches(2)), 3, ValueError, "batches: expected more batches, got an end after 2"),
        ([torch.zeros(3)], 1, TypeError, "batches: expected pairs"),
        (batches(2, float("nan")), 1, RuntimeError, "statistics of BatchNorm are not finite"),
    ],
)
def test_errors_leave_everything_as_it_was(given, count, error, message, unchanged):
    model = make_model()
    model[1].running_mean += 3
    with unchanged(model), pytest.raises(error, match=message):
        mfac.reestimate_batchnorm(model, given, count)
    assert (model[1].momentum, model[6].momentum) == (0.1, 0.3)
