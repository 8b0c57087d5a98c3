"""Optional dependencies: how to install those that are missing."""

DISTRIBUTION = "mfac-pruning"  # as in pyproject.toml; on PyPI the name mfac belongs to another project


def install_hint(package: str, extra: str) -> str:
    """Return the text of an ImportError: which package is missing, and the command that installs it."""
    return f"{package} is not installed; install it with: pip install '{DISTRIBUTION}[{extra}]'"
