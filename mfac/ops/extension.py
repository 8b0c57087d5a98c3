"""A compiled extension: its build at first use, and the fake kernels of its ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mfac import _build


class Extension:
    """The ops of a compiled module.

    Args:
        module: Name for :func:`mfac._build.load`.
        namespace: Of its ops in ``torch.ops``.

    Attributes:
        fakes: Name of an op -> its fake kernel.
    """

    def __init__(self, module: str, namespace: str) -> None:
        """Nothing is built yet."""
        self._module, self._namespace = module, namespace
        self._registered = False
        self.fakes: dict[str, Callable] = {}

    def fake(self, kernel: Callable) -> Callable:
        """Register the fake kernel of the op that its name, `_fake_<op>`, says, once the extension is loaded."""
        self.fakes[kernel.__name__.removeprefix("_fake_")] = kernel
        return kernel

    def load(self) -> dict[str, Any]:
        """Build (at first use) and load the extension, and register the fake kernels.

        Returns:
            How it was compiled.

        Raises:
            BuildError: If it cannot be built or loaded; says why and what to do.
        """
        module = _build.load(self._module)
        if not self._registered:  # an op accepts a fake only once per process
            for name, fake in self.fakes.items():
                torch.library.register_fake(f"{self._namespace}::{name}", fake)
            self._registered = True
        return module.build_config()
