"""The command `python benchmarks/kernels.py`: see `kernel_speed`.

transformers looks for a package of this name, and this folder comes first on the path of every script in it. Imported,
this module gives way to that package, and is empty where it is not installed.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

if __name__ == "__main__":
    from kernel_speed import main

    raise SystemExit(main())

_here = Path(__file__).resolve().parent
_package = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path or ".").resolve() != _here])
if _package is not None and _package.loader is not None:
    sys.modules[__name__] = importlib.util.module_from_spec(_package)
    _package.loader.exec_module(sys.modules[__name__])
