"""MobileNetV1 at width 1, 224 x 224, batch 1, by the tutorial's recipe (96.4 % of the pruned layers), converted.

Against the dense network in torch (channels_last), under torch.compile and, where onnxruntime and onnx are installed,
in ONNX Runtime, all with the same number of threads and called in turns.
"""

import pytest
import torch
from sparse_layers import in_turns, pruned_mobilenet

import mfac
from mfac.sparse.example import largest_difference


def onnx_runtime(model, x, threads, folder):
    """A function that runs the model in ONNX Runtime, or None."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return None
    path = str(folder / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)


@pytest.mark.benchmark(group="MobileNetV1, 96.4 % zeros, batch 1")
def test_network(measure, threads, tmp_path):
    model, x = pruned_mobilenet(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        fast = mfac.sparse.convert(model, x)
        functions = {"ours": lambda: fast(x)}
        if runtime := onnx_runtime(model, x, threads, tmp_path):
            functions["onnxruntime"] = runtime
        compiled = torch.compile(model)
        functions["compile"] = lambda: compiled(x)
        last = pruned_mobilenet().to(memory_format=torch.channels_last)
        moved = x.to(memory_format=torch.channels_last)
        functions["eager"] = lambda: last(moved)
        times = in_turns(functions, 15)
        measure(
            lambda: fast(x), rounds=50, by=f"converted, threads: {threads}",
            error=largest_difference(fast(x), model(x)),
            targets={"eager": 3, "compile": 2, "onnxruntime": 1.5},
            ratios={name: t / times["ours"] for name, t in times.items() if name != "ours"},
        )  # fmt: skip
    print({name: f"{1e3 * t:.2f} ms" for name, t in times.items()})
