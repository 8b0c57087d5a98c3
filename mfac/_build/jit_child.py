"""The program that compiles: it reads a job as JSON from standard input. `jit` runs it in a process of its own."""

import json
import shlex
import sys


def main() -> int:
    """Return 0 after compiling the job, 1 if that fails; the reason is then printed."""
    job = json.load(sys.stdin)
    sys.path[:] = job["sys_path"]
    from torch.utils import cpp_extension

    try:
        cpp_extension.load(
            job["name"],
            job["sources"],
            extra_cflags=[shlex.quote(flag) for flag in job["cflags"]],
            extra_cuda_cflags=job["cuda_cflags"],
            extra_ldflags=job["ldflags"],
            extra_include_paths=job["include_dirs"],
            build_directory=job["folder"],
            verbose=True,
        )
    except (RuntimeError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
