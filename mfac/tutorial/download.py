"""Fetch Imagenette, as torchvision and Hugging Face datasets do: from its publisher's server, checked by digest."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from mfac.progress import progress_bar

_SERVER = "https://s3.amazonaws.com/fast-ai-imageclas"
# Shorter side of the images -> archive and its MD5 digest.
_ARCHIVES = {
    160: ("imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    320: ("imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    None: ("imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
}
_CHUNK = 2**20  # bytes
_SECONDS = 30  # without an answer


def fetch_imagenette(folder: str | Path, image_size: int) -> Path:
    """Return a folder with Imagenette's train/ and val/, downloading it if it is not there.

    Args:
        folder: Where the dataset is kept.
        image_size: Height and width that are needed: the smallest archive that has them is taken.

    Returns:
        The folder with train/ and val/.

    Raises:
        OSError: If the server does not answer, or gives another file than was published; nothing is kept then.
    """
    name, digest = next(archive for side, archive in _ARCHIVES.items() if side is None or side >= image_size)
    target = Path(folder) / name.removesuffix(".tgz")
    if (target / "train").is_dir() and (target / "val").is_dir():
        return target
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as partial:
        archive = Path(partial) / name
        _download(f"{_SERVER}/{name}", archive, digest)
        tqdm.write(f"extracting {name}")
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        archive.unlink()
        if target.exists():  # of another process, or incomplete
            shutil.rmtree(target)
        os.replace(Path(partial) / target.name, target)
    return target


def _download(url: str, path: Path, digest: str) -> None:
    found = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            tqdm.write(f"downloading {url}, {total / 1e6:.0f} MB")
            with progress_bar(True, "download", total or None, unit="B") as bar:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    found.update(chunk)
                    bar.update(len(chunk))
    except urllib.error.URLError as error:
        raise OSError(f"download: expected {url}, got no answer: {error.reason}") from error
    if found.hexdigest() != digest:
        raise OSError(f"download: expected a file with the MD5 digest {digest} from {url}, got {found.hexdigest()}")
