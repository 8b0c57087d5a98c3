"""Imagenette from a server: a local one here."""

import hashlib
import http.server
import io
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from mfac.cli.main import main
from mfac.tutorial import download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of an archive with two classes of two images."""
    files = {}
    for part in ("train", "val"):
        for name in "ab":
            for index in range(4):
                file = io.BytesIO()
                Image.fromarray(np.full((40, 40, 3), index, np.uint8)).save(file, "JPEG")
                files[f"imagenette2-160/{part}/{name}/{index}.JPEG"] = file.getvalue()
    (tmp_path / "www").mkdir()
    with tarfile.open(tmp_path / "www" / "imagenette2-160.tgz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path / "www"))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(download, "_SERVER", f"http://127.0.0.1:{running.server_port}")
        archive = (tmp_path / "www" / "imagenette2-160.tgz").read_bytes()
        digest = hashlib.md5(archive).hexdigest()
        monkeypatch.setitem(download._ARCHIVES, 160, ("imagenette2-160.tgz", digest))
        yield tmp_path / "www"
        running.shutdown()


def test_the_program_downloads_once(server, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("modifiers:\n  - !EpochRangeModifier {end_epoch: 1}\n")
    command = (
        f"train --recipe-path {tmp_path / 'r.yaml'} --dataset imagenette --download --dataset-path {tmp_path / 'data'} "
    )
    command += f"--image-size 32 --train-batch-size 4 --width 0.1 --save-dir {tmp_path} --overwrite"
    assert main(command.split()) == 0
    assert "downloading http://127.0.0.1" in capsys.readouterr().out
    assert len(list((tmp_path / "data").rglob("*.JPEG"))) == 16
    assert main(command.split()) == 0
    assert "downloading" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["imagenette2-160"]


def test_what_comes_is_checked(server, tmp_path):
    archive = server / "imagenette2-160.tgz"
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(OSError, match="download: expected a file with the MD5 digest"):
        download.fetch_imagenette(tmp_path / "data", 128)
    archive.unlink()
    with pytest.raises(OSError, match=r"download: expected http://127.0.0.1.*, got no answer: File not found"):
        download.fetch_imagenette(tmp_path / "data", 128)
    assert list((tmp_path / "data").iterdir()) == []
    assert main(["eval", "m.pt", "--download"]) == 2
