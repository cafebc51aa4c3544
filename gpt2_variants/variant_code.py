"""Variants that a user's own file or module brings: `--variant path/to/idea.py` or `package.module`, with `:NAME`.

The file is read once, checked, and loaded from what was read. It travels: a run keeps a copy of it in `code/`, and an
export holds it with the parts of this package that it imports, so that it loads without this package.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.util
import re
import sys
import traceback
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .registry import VARIANTS, Variant
from .variant_text import MODELS, PACKAGE, imports_from, model_files, module_name, travel_faults, without_package

FOLDER = "code"  # of a run
_OWN_PACKAGE = f"{PACKAGE}_own_"
_LOADED: dict[tuple[str, str], Variant] = {}


class VariantError(ValueError):
    """A variant that is not known, or a file that brings none: one line that begins with what was asked for."""


@dataclass(frozen=True)
class VariantCode:
    """The file of a variant and the files beside it that it imports, as they were read.

    Attributes:
        file: its name, as a module's: `my-idea.py` is `my_idea.py`.
        texts: file name -> content, the file itself first.
        digest: SHA-256 of all of them.
        added: what stands at the end of the file where it travels: the config class that it leaves out.
    """

    file: str
    texts: dict[str, str]
    digest: str
    added: str = ""

    def copy_to(self, folder: Path) -> None:
        """Write the files to `folder`, as they are; it is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.texts.items():
            (folder / name).write_bytes(text.encode())

    def travel_to(self, folder: Path) -> None:
        """Write to `folder` the files as they load without this package, and the parts of it that they import."""
        wanted = set()
        for name, text in self.texts.items():
            added = self.added if name == self.file else ""
            (folder / name).write_bytes((without_package(text) + added).encode())
            wanted |= model_files(text)
        while wanted:
            part = wanted.pop()
            if not (folder / f"{part}.py").exists():
                text = (MODELS / f"{part}.py").read_text(encoding="utf-8")
                (folder / f"{part}.py").write_bytes(text.encode())
                wanted |= {node.module for node in imports_from(text) if node.level == 1 and node.module}


def find(asked: str) -> Variant:
    """Return the variant that `asked` names: one of the package, or one of a file or a module.

    Raises:
        VariantError: there is none, or its file cannot be used.
    """
    if asked in VARIANTS:
        return VARIANTS[asked]
    place, _, name = asked.partition(":") if not re.match(r"[A-Za-z]:[\\/]", asked) else (asked, "", "")
    if place.endswith(".py") or "/" in place:
        return _from_file(Path(place).expanduser(), name, asked)
    if "." in place or name:
        return _from_file(_file_of_module(place, asked), name, asked)
    near = difflib.get_close_matches(asked, VARIANTS, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    if Path(f"{asked}.py").is_file():
        meant = f" (did you mean the file {asked}.py?)"
    raise VariantError(
        f"{asked}: not known{meant}; one of {', '.join(VARIANTS)}, or a file of your own: path/to/idea.py"
    )


def known(name: str, digest: str | None) -> Variant:
    """Return the variant of the package, or, with a `digest` of its code, the one that this process has loaded.

    Raises:
        VariantError: there is no such variant.
    """
    if digest is None and name in VARIANTS:
        return VARIANTS[name]
    if digest is not None and (name, digest) in _LOADED:
        return _LOADED[name, digest]
    where = "is not one of the package's" if digest is None else "comes from a file that is not loaded"
    raise VariantError(f"{name}: {where}; the package has {', '.join(VARIANTS)}")


def file_in_run(folder: Path, plan: dict[str, Any]) -> str | None:
    """Return what `find` takes for the variant of the run in `folder`, by its plan; None for one of the package."""
    if plan.get("variant_code") is None or plan.get("variant_file") is None:
        return None
    return f"{folder / FOLDER / plan['variant_file']}:{plan['variant']}"


def of_run(folder: Path, plan: dict[str, Any]) -> Variant:
    """Return the variant of the run in `folder`, by its plan; one of a user's file from the copy that the run keeps.

    Raises:
        VariantError: the variant is not known, or its copy is gone or is not what was trained.
    """
    digest = plan.get("variant_code")
    if digest is None or (plan["variant"], digest) in _LOADED:
        return known(plan["variant"], digest)
    asked = file_in_run(folder, plan)
    assert asked is not None
    found = find(asked)
    if found.code is None or found.code.digest != digest:
        raise VariantError(f"{asked}: was changed since the run was trained; put back the file as it was")
    return found


def _file_of_module(name: str, asked: str) -> Path:
    """Return the file of the module `name`, as Python finds it from the current folder."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    except Exception as err:  # what a package's own __init__ raises
        raise VariantError(f"{asked}: {type(err).__name__}: {_one_line(err)}") from err
    finally:
        sys.path[:] = before
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise VariantError(
            f"{asked}: neither a variant of the package ({', '.join(VARIANTS)}) nor a module that Python finds; give a "
            "file: path/to/idea.py"
        )
    return Path(spec.origin)


def _from_file(path: Path, name: str, asked: str) -> Variant:
    if path.is_dir():
        raise VariantError(f"{asked}: is a folder; give the file in it that says VARIANT = Variant(...)")
    code = _read(path, asked)
    module = _module_of(code, path, asked)
    record = _record(module, name, asked)
    if (record.name, code.digest) not in _LOADED:
        model: Any = getattr(module, record.model, None) if isinstance(record.model, str) else record.model
        if isinstance(model, type) and (added := _left_out(model, record.name)):
            exec(compile(added, str(path), "exec"), module.__dict__)
            code = dataclasses.replace(code, added=added)
        _LOADED[record.name, code.digest] = _checked(record, model, code, module, asked)
    return _LOADED[record.name, code.digest]


def _read(path: Path, asked: str) -> VariantCode:
    """Return the file and those beside it that it imports. Raises `VariantError` where they could not travel."""
    texts: dict[str, str] = {}
    own_name = module_name(path)
    waiting = [path]
    while waiting:
        file = waiting.pop(0)
        name = own_name if file == path else file.name
        try:
            texts[name] = text = file.read_bytes().decode("utf-8-sig")
            ast.parse(text)
        except OSError as err:
            raise VariantError(f"{asked}: cannot be read: {err.strerror} ({file})") from err
        except (SyntaxError, ValueError) as err:
            where = f"line {err.lineno}: {err.msg}" if isinstance(err, SyntaxError) else str(err)
            raise VariantError(f"{asked}: {file.name} is not Python: {where}") from err
        if file != path and (MODELS / name).exists():
            raise VariantError(f"{asked}: {name} beside it has the name of a part of {PACKAGE}.models; rename it")
        if faults := travel_faults(file, text):
            raise VariantError(f"{asked}: {'; '.join(faults)}")
        beside = (path.with_name(f"{node.module}.py") for node in imports_from(text) if node.level == 1)
        waiting += [other for other in beside if other.name not in texts and other not in waiting]
    digest = hashlib.sha256("\0".join(part for item in texts.items() for part in item).encode()).hexdigest()
    return VariantCode(own_name, texts, digest)


def _left_out(model: type, name: str) -> str:
    """Return code that gives a model and its transformer a config class of their own, where the file has none."""
    from transformers import GPT2Config

    config = getattr(model, "config_class", None)
    transformer = getattr(model, "transformer_class", None)
    if config is None or transformer is None or transformer.config_class is not GPT2Config:
        return ""
    stem, own, code = model.__name__.removesuffix("LMHeadModel"), config.__name__, ""
    if config is GPT2Config:
        own = f"{stem}Config"
        code = f"""

from transformers import GPT2Config


class {own}(GPT2Config):
    model_type = "{name.replace("_", "-")}-gpt2"
"""
    elif config.model_type == GPT2Config.model_type:
        return ""
    return f"""{code}

{stem}Transformer = type(
    "{stem}Transformer", ({model.__name__}.transformer_class,), {{"config_class": {own}, "__module__": __name__}}
)
{model.__name__}.config_class, {model.__name__}.transformer_class = {own}, {stem}Transformer
"""


class _Loader(importlib.abc.InspectLoader):
    """Loads the modules of one variant from the texts that were read: never from bytecode of another state."""

    def __init__(self, package: str, code: VariantCode, path: Path):
        self.package, self.code, self.path = package, code, path

    def file_of(self, fullname: str) -> str:
        """Return where the text of a module was read, for tracebacks."""
        name = f"{fullname.rpartition('.')[2]}.py"
        return str(self.path if name == self.code.file else self.path.with_name(name))

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return how the modules of this variant are loaded; None for all others."""
        if fullname == self.package:
            return ModuleSpec(fullname, self, is_package=True)
        parent, _, stem = fullname.rpartition(".")
        if parent != self.package or f"{stem}.py" not in self.code.texts:
            return None
        spec = ModuleSpec(fullname, self, origin=self.file_of(fullname))
        spec.has_location = True
        return spec

    def get_source(self, fullname: str) -> str:
        """Return the text of a module; "" of the package that holds them."""
        return self.code.texts.get(f"{fullname.rpartition('.')[2]}.py", "")

    def get_code(self, fullname: str) -> Any:
        """Return the compiled text of a module, which tracebacks tell by its file."""
        return compile(self.get_source(fullname), self.file_of(fullname), "exec", dont_inherit=True)


def _module_of(code: VariantCode, path: Path, asked: str) -> ModuleType:
    """Return the module of a user's file, executed once for each content. Raises `VariantError` where that fails."""
    package = _OWN_PACKAGE + code.digest[:16]
    name = f"{package}.{code.file.removesuffix('.py')}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _Loader(package, code, path.absolute())
    sys.meta_path.append(loader)
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as err:
        sys.meta_path.remove(loader)
        lines = [
            frame.lineno for frame in traceback.extract_tb(err.__traceback__) if frame.filename.endswith(path.name)
        ]
        at = f"line {lines[-1]}: " if lines else ""
        raise VariantError(f"{asked}: {at}{type(err).__name__}: {_one_line(err)}") from err


def _record(module: ModuleType, name: str, asked: str) -> Variant:
    """Return the module's record: the one of that `name`, or the only one."""
    found = [getattr(module, "VARIANT", None), *_as_tuple(getattr(module, "VARIANTS", ()))]
    records = {record.name: record for record in found if isinstance(record, Variant)}
    if not records:
        raise VariantError(
            f'{asked}: brings no variant; say in it VARIANT = Variant(name="idea", family="idea", summary="...", '
            f"model=IdeaLMHeadModel), with the Variant of {PACKAGE}.registry"
        )
    if name and name not in records:
        raise VariantError(f"{asked}: has no variant {name}; it has {', '.join(records)}")
    if not name and len(records) > 1:
        raise VariantError(f"{asked}: has several variants; say which: {', '.join(f'{asked}:{r}' for r in records)}")
    return records[name] if name else next(iter(records.values()))


def _as_tuple(records: Any) -> tuple[Any, ...]:
    if isinstance(records, dict):
        return tuple(records.values())
    return tuple(records) if isinstance(records, (list, tuple)) else ()


def _checked(record: Variant, model: Any, code: VariantCode, module: ModuleType, asked: str) -> Variant:
    """Return the record with its class and its code. Raises `VariantError` with all that is wrong with it."""
    if faults := _record_faults(record) + _class_faults(model, module):
        raise VariantError(f"{asked}: {'; '.join(faults)}")
    made = dataclasses.replace(record, model=model, module=None, code=code)
    if unknown := sorted(record.overrides.keys() - made.config_fields().keys()):
        raise VariantError(f"{asked}: overrides {', '.join(unknown)}: {made.config_class.__name__} has no such field")
    return made


def _record_faults(record: Variant) -> list[str]:
    faults = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", str(record.name)) or record.name in VARIANTS:
        faults.append(
            f"name={record.name!r}: small letters, digits and _ are allowed, and no name that the package has itself"
        )
    if not isinstance(record.block_size, int) or record.block_size < 2:
        faults.append(f"block_size={record.block_size!r}: a whole number from 2 is needed")
    if not isinstance(record.extra_vocabulary, int) or record.extra_vocabulary < 0:
        faults.append(f"extra_vocabulary={record.extra_vocabulary!r}: a whole number from 0 is needed")
    return faults


def _class_faults(model: Any, module: ModuleType) -> list[str]:
    from transformers import GPT2Config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from .models.modeling_base import VariantLMHeadModel

    if not isinstance(model, type) or not issubclass(model, VariantLMHeadModel):
        return [f"model={getattr(model, '__name__', model)!r}: a subclass of VariantLMHeadModel is needed"]
    config, transformer = model.config_class, model.transformer_class
    own = 'class IdeaConfig(GPT2Config): model_type = "idea-gpt2"'
    taken = {*CONFIG_MAPPING_NAMES, *(variant.config_class.model_type for variant in VARIANTS.values())}
    if not issubclass(config, GPT2Config) or config.model_type in taken:
        return [
            f"{model.__name__}.config_class is {config.__name__}, whose model_type {config.model_type!r} says that the "
            f"model is another one; give it its own: {own}"
        ]
    faults = [
        f"{cls.__name__} is defined in {cls.__module__}; it belongs in the file, which travels with the model"
        for cls in (model, config)
        if cls.__module__.rpartition(".")[0] != module.__name__.rpartition(".")[0]
    ]
    if transformer.config_class is not config:
        faults.append(
            f"{transformer.__name__}, the transformer_class of {model.__name__}, has another config_class, "
            f"{transformer.config_class.__name__}; give both {config.__name__}"
        )
    return faults


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split())
