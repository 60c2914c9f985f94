"""The machine in front of us: what its figures are about, what its processor can execute, and what makes it fast."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")  # no library: py-cpuinfo starts processes and takes a second to say what four lines do
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_SETS = ("amx_tile", "avx512_bf16", "avx512f", "avx2", "avx", "sve2", "sve", "asimd")  # the widest first
PACKAGES = ("jax", "jaxlib", "numpy")


def describe() -> dict[str, object]:
    """Processor, its widest instruction set, the cores that this process may use, memory, and versions."""
    flags = _flags()
    return {
        "cpu": _field("model name") or platform.processor() or platform.machine(),
        "instruction_set": next((name for name in _SETS if name in flags), "unknown"),
        "cores": cores(), "memory_gb": round(_memory() / 1e9, 1), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "huge_pages": HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", ""),
    }


def summary(about: dict[str, object]) -> str:
    return (f"{about['cpu']} ({about['instruction_set']}), {about['cores']} cores, {about['memory_gb']} GB; "
            f"Python {about['python']}, {', '.join(f'{name} {about[name]}' for name in PACKAGES)}"
            f"{'' if about['huge_pages'] else '; without huge pages'}")


def use_huge_pages() -> None:
    """Begins this process anew, in its place, with huge pages for large arrays, unless it has GLIBC_TUNABLES of its own: glibc
    reads them only at a program's start. Nothing is done where there is no glibc."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def process_began() -> float:
    """When this process was started, in Unix time; now, where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the machine was
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError):
        return time.time()


def cores() -> int:
    """How many this process may use, which containers and `taskset` make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def code_key() -> str:
    """The same for processors that execute the same machine code: the architecture and a hash of the instruction sets."""
    return f"{platform.machine()}-{hashlib.sha256(' '.join(sorted(_flags())).encode()).hexdigest()[:8]}"


def code_version() -> str:
    """A hash of the package's own text."""
    package = Path(__file__).parent
    text = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        text.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return text.hexdigest()[:16]


def versions() -> dict[str, str]:
    """What two processes of one run must have alike: this package, Python, and the libraries that decide on numbers."""
    return {"emo_jax": code_version(), "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES}}


def _flags() -> set[str]:
    return set((_field("flags") or _field("Features")).split())


def _field(name: str) -> str:
    try:
        found = re.search(rf"^{name}\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
