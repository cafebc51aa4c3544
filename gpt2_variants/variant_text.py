"""The text of a user's own variant: what it may import, and how it reads where this package is not installed."""

import ast
import re
from pathlib import Path

PACKAGE = __package__
MODELS = Path(__file__).with_name("models")
MODELS_PREFIX = f"{PACKAGE}.models."
_RECORDS = ("VARIANT", "VARIANTS")


def travel_faults(file: Path, text: str) -> list[str]:
    """Return what in a file would keep it from loading without this package, one line each."""
    faults = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        at = f"{file.name}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
                faults.append(
                    f"{at}: write from {PACKAGE}.models.modeling_base import ..., which travels with the model"
                )
            beside = [alias.name for alias in node.names if file.with_name(f"{alias.name}.py").is_file()]
            faults += [f"{at}: {name}.py travels with the model as from .{name} import ..." for name in beside]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            part = module.removeprefix(MODELS_PREFIX)
            if node.level == 0 and module.split(".")[0] == PACKAGE:
                of_models = module != part and (MODELS / f"{part}.py").is_file()
                if not of_models and not _is_record_import(node):
                    faults.append(
                        f"{at}: of {PACKAGE}, files of {PACKAGE}.models and the Variant of its registry can be imported"
                    )
                elif node not in tree.body:
                    faults.append(f"{at}: imports of {PACKAGE} belong at the head of the file, so that they can travel")
            elif node.level == 0 and module and "." not in module and file.with_name(f"{module}.py").is_file():
                faults.append(f"{at}: {module}.py travels with the model as from .{module} import ...")
            elif node.level == 1 and not file.with_name(f"{module}.py").exists() and (MODELS / f"{module}.py").exists():
                faults.append(f"{at}: write from {MODELS_PREFIX}{module} import ...")
            elif node.level > 1 or (node.level == 1 and not module.isidentifier()):
                faults.append(
                    f"{at}: files beside this one are imported as from .helpers import ..., others not at all"
                )
    kept = {id(child) for node in tree.body if not _is_of_the_record(node) for child in ast.walk(node)}
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom) and _is_record_import(node))
    named = {alias.asname or alias.name for node in imports for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and id(node) in kept and node.id in named:
            faults.append(
                f"{file.name}, line {node.lineno}: {node.id} is used beside VARIANT = ..., which does not travel"
            )
    return faults


def module_name(path: Path) -> str:
    """Return the name that a file has as a module, beside the parts of the package that it travels with."""
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    return f"own_{name}.py" if not name.isidentifier() or (MODELS / f"{name}.py").exists() else f"{name}.py"


def imports_from(text: str) -> list[ast.ImportFrom]:
    """Return the statements `from x import y` of a file, wherever they stand in it."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]


def model_files(text: str) -> set[str]:
    """Return the files of `models/`, without their suffix, that a user's file imports."""
    modules = (node.module or "" for node in imports_from(text) if node.level == 0)
    return {module.removeprefix(MODELS_PREFIX) for module in modules if module.startswith(MODELS_PREFIX)}


def without_package(text: str) -> str:
    """Return a user's file as it loads beside the parts of this package that it imports, comments and all."""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        first, end = node.lineno - 1, node.end_lineno
        if _is_of_the_record(node):
            del lines[first:end]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(MODELS_PREFIX):
            lines[first] = lines[first].replace(MODELS_PREFIX, ".", 1)
    return "".join(lines).rstrip() + "\n"


def _is_record_import(node: ast.AST) -> bool:
    """Return whether `node` is the import of `Variant`, which only the record needs."""
    if not isinstance(node, ast.ImportFrom) or node.level or node.module not in (f"{PACKAGE}.registry", PACKAGE):
        return False
    return all(alias.name == "Variant" for alias in node.names)


def _is_of_the_record(node: ast.AST) -> bool:
    """Return whether the statement `node` stays behind: the record, or the import that only it needs."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return _is_record_import(node) or bool(names and set(names) <= set(_RECORDS))
