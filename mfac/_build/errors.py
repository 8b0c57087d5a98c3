"""The errors of this package, and their text."""


class BuildError(RuntimeError):
    """The compiled kernels are not available; the text says what was tried, the likely cause and the fix."""


class CompileError(BuildError):
    """The compiler was found and failed."""


def explain(tried: list[str], cause: str, fix: str, output: str = "") -> str:
    """Return the text of a `BuildError`."""
    lines = ["the compiled kernels of mfac cannot be built or loaded", "  tried:"]
    lines += [f"    {line}" for line in tried] + [f"  likely cause: {cause}", f"  fix: {fix}"]
    return "\n".join(lines) + output
