"""NVIDIA's driver on this machine, and which build of torch it can run.

`python nvidia.py` prints what `make install` hands to pip: torch, and where its build for this driver is found. It
needs nothing installed.
"""

import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

# The least CUDA version that the driver must know -> the folder of PyTorch's index. Builds for CUDA 12.6 run on every
# driver of CUDA 12, but hold no code for GPUs of 2025; of CUDA 12.8 torch 2.11 is the last.
BUILDS = (((13, 0), "cu130"), ((12, 8), "cu128"), ((12, 0), "cu126"))
INDEX = "https://download.pytorch.org/whl"


class Driver(NamedTuple):
    """What `nvidia-smi` says: the driver's version, and the highest CUDA version that it knows; None: nothing."""

    version: str | None
    cuda: tuple[int, int] | None


def driver() -> Driver | None:
    """Return NVIDIA's driver; None where there is no `nvidia-smi`, or it finds no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        said = subprocess.run([program], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if said.returncode:
        return None
    version = re.search(r"(?:Driver|KMD) Version:\s*([\d.]+)", said.stdout)
    cuda = re.search(r"CUDA (?:\w+ )?Version:\s*(\d+)\.(\d+)", said.stdout)
    return Driver(version[1] if version else None, (int(cuda[1]), int(cuda[2])) if cuda else None)


def build_for(cuda: tuple[int, int]) -> str | None:
    """Return the newest build of torch, as cu126, that a driver which knows `cuda` can run; None if it is too old."""
    return next((build for least, build in BUILDS if cuda >= least), None)


def unused_gpu() -> str | None:
    """Return in a line, with the cure, why torch has no CUDA though a driver is here; None where nothing is amiss.

    For whoever would choose between the GPU and the CPU by what torch sees.
    """
    from .ranks import has_cuda

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # on purpose
    if hidden or has_cuda() or (found := driver()) is None:
        return None
    import torch

    here = f"nvidia-smi finds a GPU (driver {found.version or 'of unknown version'}"
    here += f", CUDA {found.cuda[0]}.{found.cuda[1]})" if found.cuda else ")"
    build = build_for(found.cuda) if found.cuda else None
    if found.cuda and build is None:
        cure = "update the driver to 525.60 or newer"
    else:
        where = f" --index-url {INDEX}/{build}" if build else ""
        cure = f"install a build for the driver: pip install --force-reinstall 'torch>=2.11'{where}"
    why = "is a build without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} cannot use it"
    return f"{here}, but torch {torch.__version__} {why}; {cure}"


def main() -> int:
    """Print pip's arguments for a torch that fits the driver; 1 where the driver is too old, with a line on stderr."""
    found = driver()
    if found is None or found.cuda is None:
        print("torch>=2.11")
        return 0
    build = build_for(found.cuda)
    if build is None:
        known = f"CUDA {found.cuda[0]}.{found.cuda[1]}"
        told = f"error: the NVIDIA driver {found.version} ({known}) is too old for torch 2.11"
        print(f"{told}; update it to 525.60 or newer", file=sys.stderr)
        return 1
    print(f"torch>=2.11 --index-url {INDEX}/{build}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
