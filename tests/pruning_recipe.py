"""A recipe with one pruning modifier, whose name is filled in."""

PRUNING = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 3}
  - !%s
    params: [0.weight]
    init_sparsity: 0.25
    final_sparsity: 0.75
    start_epoch: 1.0
    end_epoch: 2.0
    update_frequency: 0.5
    inter_func: linear
"""
