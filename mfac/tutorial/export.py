"""`mfac export`: a pruned model as files for use elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mfac.checks import check_choice, warn
from mfac.export.compressed import save_compressed
from mfac.export.onnx import export_onnx
from mfac.export.verify import verify
from mfac.extras import install_hint
from mfac.files.container import write_tensors
from mfac.tutorial.files import NETWORK_FILE, make_folder, read_model, save, save_text
from mfac.tutorial.inspect import load_built
from mfac.tutorial.settings import NETWORK, ModelSettings, resolve

Format = Literal["pt", "safetensors", "compressed", "onnx"]
_ONNX = ("onnx", "onnxscript", "onnxruntime")
_SAMPLES = 2  # images on which ONNX Runtime and torch are compared; one would fix the size of a batch
_SPEED = (
    "Zeros at any place make a model smaller, not faster, where a dense kernel multiplies by them too: "
    "see docs/guides/where-zeros-pay.md"
)


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    model: nn.Module
    network: dict[str, Any]
    image_size: int

    @property
    def metadata(self) -> dict[str, str]:
        """The description, for files that hold strings beside the tensors."""
        return {"format": "pt", "network": json.dumps(self.network)}


def _state_dict(source: _Source, path: Path) -> str:
    save(source.model.state_dict(), path)
    save_text(f"{json.dumps(source.network, indent=1)}\n", path.with_name(NETWORK_FILE))
    return f"{path}: dense state_dict with exact zeros"


def _safetensors(source: _Source, path: Path) -> str:
    state: dict[str, Tensor] = source.model.state_dict()
    write_tensors(path, state, source.metadata)
    return f"{path}: the state_dict as safetensors"


def _compressed(source: _Source, path: Path) -> str:
    written = save_compressed(source.model, path, metadata=source.metadata)
    size = f"{written.nbytes / 1e6:.2f} MB, {100 * written.ratio:.2f} % of dense"
    return f"{path}: the state_dict without its zeros, {size}; mfac.load_compressed reads it"


def _onnx(source: _Source, path: Path) -> str:
    size = source.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_SAMPLES, 3, size, size, generator=generator)
    written = export_onnx(source.model, images, path)
    left = f", {written.batchnorms} BatchNorms not folded" if written.batchnorms else ", BatchNorm folded"
    error = f"within {written.error:.1e} of torch in ONNX Runtime"
    return f"{path}: the network for images of {size} x {size}{left}, {error}"


FORMATS: dict[str, tuple[str, Callable[[_Source, Path], str]]] = {
    "pt": ("model.pt", _state_dict),
    "safetensors": ("model.safetensors", _safetensors),
    "compressed": ("model.compressed.safetensors", _compressed),
    "onnx": ("model.onnx", _onnx),
}


def export(checkpoint_path: str, output: str, settings: ModelSettings, formats: Collection[str] | None = None) -> None:
    """Write a pruned model for use elsewhere, and print its size in several formats.

    Args:
        checkpoint_path: A checkpoint of `mfac train`, a state_dict, or a safetensors file.
        output: The folder to write into.
        settings: Which model; what is not given is as the file says.
        formats: Keys of ``FORMATS``; None: all, ONNX if its packages are installed.

    Raises:
        ValueError: If it is not such a file, its weights are not finite, an option is not that of its network, or the
            folder cannot be written to.
        ImportError: If ONNX is asked for and a package of it is not installed.
    """
    missing = next((package for package in _ONNX if find_spec(package) is None), None)
    for name in formats or ():
        check_choice("format", name, FORMATS)
    if missing is not None and formats and "onnx" in formats:
        raise ImportError(install_hint(missing, "onnx"))
    state, described = read_model("checkpoint_path", checkpoint_path)
    settings = resolve(settings, described, checkpoint_path, (*NETWORK, "image_size"))
    matrices = [value for value in state.values() if isinstance(value, Tensor) and value.dim() == 2]
    if "num_classes" not in described and not matrices:
        raise ValueError(f"checkpoint_path: expected a model of `mfac train`, got {checkpoint_path}")
    classes = described.get("num_classes") or len(matrices[-1])  # the last is the classifier
    built = load_built(state, checkpoint_path, settings, described, classes)
    model = built.model.cpu()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0)  # -0.0 becomes +0.0
    assert settings.image_size is not None
    source = _Source(model, asdict(built.spec), settings.image_size)
    folder = make_folder("output", output)
    present = {file for file, _ in FORMATS.values() if (folder / file).exists()}
    written = []
    for name, (file, write) in FORMATS.items():
        if formats and name not in formats:
            continue
        if name == "onnx" and missing is not None:
            tqdm.write(f"no ONNX file: {install_hint(missing, 'onnx')}")
            continue
        tqdm.write(write(source, folder / file))
        written.append(folder / file)
    others = sorted(present - {path.name for path in written})
    if others:
        left = " and ".join(others)
        warn(f"output: {folder} also holds {left}, which this export does not write: perhaps of another model")
    found = verify(written[0])
    tqdm.write(f"sparsity {100 * found.sparsity:.2f} %")
    for name in ("dense", "zipped", "compressed"):
        count = found.sizes[name]
        tqdm.write(f"  {name:10} {count / 1e6:8.2f} MB  {found.sizes['dense'] / count:5.1f}x")
    tqdm.write(_SPEED)
