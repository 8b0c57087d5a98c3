"""A user's program, for `mypy --strict` (tests/test_typing.py): every public call, and the types that come back."""

import torch
from torch import Tensor, nn

import mfac


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def main() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    loader = [(torch.randn(8, 16), torch.randint(0, 4, (8,))) for _ in range(4)]

    params: dict[str, nn.Parameter] = mfac.prunable_parameters(model)
    grads: mfac.GradientBuffer = mfac.collect_gradients(model, loader, loss_fn, 8)
    predicted: mfac.Frontier = mfac.frontier(model, grads, [0.5, 0.7], patterns=["unstructured", "2:4"])
    print(predicted, sum(p.numel() for p in params.values()))

    result: mfac.PruneResult = mfac.prune_step(model, grads, sparsity=0.5)
    masks: dict[str, Tensor] = result.masks
    reached: float = result.sparsity
    print(result, reached, sorted(masks))
    mfac.reestimate_batchnorm(model, loader, 4)

    again: mfac.PruneResult = mfac.prune(
        model, loader, loss_fn, sparsity={"0.weight": 0.75}, recomputations=2, num_grads=8, progress=False
    )
    again.to_json("pruned.json")

    buffer = mfac.GradientBuffer(2, params)
    loss_fn(model(loader[0][0]), loader[0][1]).backward()  # type: ignore[no-untyped-call]
    full: bool = buffer.append(model)
    fisher = mfac.Fisher(buffer.tensor, damping=1e-3, block_size=8)
    diagonal: Tensor = fisher.inverse_diagonal()
    print(full, diagonal.shape, fisher.inverse_product(diagonal))

    pruner = mfac.Pruner(model, loader, loss_fn, sparsity=0.9, end=10, frequency=5, num_grads=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step: mfac.PruneResult | None = pruner.step()
        print(step)
    pruner.load_state_dict(pruner.state_dict())


if __name__ == "__main__":
    main()
