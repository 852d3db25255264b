"""Which module may know of what: read from the source's imports, late ones included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blip2_serve

PACKAGE = "blip2_serve"
ROOT = Path(blip2_serve.__file__).parent
WEB = {"fastapi", "starlette", "pydantic"}


def imports_of(source: str, module: str) -> set[str]:
    """Dotted names that a module's source imports, anywhere in it.

    `from a import b` yields both "a" and "a.b", since b may be a module.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def modules_under(*places: str) -> dict[str, Path]:
    """Modules by dotted name; a place is a folder or a file of the package."""
    paths: list[Path] = []
    for place in places:
        path = ROOT / place
        assert path.exists(), path
        paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return {name_of(path): path for path in paths}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ALL = modules_under(".")


def reached_by(module: str, sources: dict[str, str]) -> set[str]:
    """Outside packages that a module imports, itself or through this package's other modules."""
    outside: set[str] = set()
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sources:
            continue
        seen.add(name)
        waiting += [name.rpartition(".")[0]]  # importing a.b runs a's __init__ too
        for imported in imports_of(sources[name], name):
            top = imported.partition(".")[0]
            if top == PACKAGE:
                waiting.append(imported)
            else:
                outside.add(top)
    return outside


SOURCES = {name: path.read_text() for name, path in ALL.items()}


# Folder -> packages that nothing in it may import, itself or through this package's other modules.
FORBIDDEN = {
    "engine": {"ray", "torch", "numba", *WEB},
    "model": {"ray", *WEB},
    "compute": {"ray", *WEB},
    "http": {"ray", "torch", "transformers", "numba"},
}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [(module, names) for place, names in FORBIDDEN.items() for module in modules_under(place)],
)
def test_a_folder_reaches_nothing_that_it_must_not_know(module: str, forbidden: set[str]) -> None:
    assert not reached_by(module, SOURCES) & forbidden


@pytest.mark.parametrize(
    "module",
    modules_under(
        "model/decode_worker.py",
        "model/fingerprint.py",
        "model/pictures",
        "model/processor.py",
        "model/source.py",
    ),
)
def test_the_preprocessors_modules_reach_no_torch(module: str) -> None:
    assert not reached_by(module, SOURCES) & {"torch", "transformers"}


# Package -> the only places whose own imports may name it.
HOMES = {
    "ray": ("app", "cli", "stages", "observe", "serve_internals"),
    "numba": ("compute.cpu",),
    "llvmlite": ("compute.cpu",),
    "triton": ("compute.cuda",),
}


@pytest.mark.parametrize(("package", "homes"), HOMES.items())
def test_a_package_is_imported_at_home_only(package: str, homes: tuple[str, ...]) -> None:
    importing = {
        name.removeprefix(f"{PACKAGE}.")
        for name, source in SOURCES.items()
        if any(imported.partition(".")[0] == package for imported in imports_of(source, name))
    }

    assert importing
    assert not {
        name for name in importing if not f"{name}.".startswith(tuple(f"{h}." for h in homes))
    }


def private_names_of(package: str, source: str) -> set[str]:
    """Names that begin with an underscore and that a source takes from a package, dots included.

    They are imported, or reached from something imported, also through calls and indexing.
    """
    found: set[str] = set()
    bound: dict[str, str] = {}  # name in the source -> dotted name
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                bound[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    found |= {*bound.values()}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (root := _root(node)) in bound:
            found.add(f"{bound[root]}.{node.attr}")
    return {
        name
        for name in found
        if name.partition(".")[0] == package
        and any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    }


def _root(node: ast.expr) -> str | None:
    """The name that a chain of attributes, calls and indices begins with."""
    while True:
        match node:
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=inner):
                node = inner
            case ast.Name(id=name):
                return name
            case _:
                return None


@pytest.mark.parametrize("module", ALL)
def test_rays_private_names_are_used_in_one_module_only(module: str) -> None:
    private = private_names_of("ray", SOURCES[module])
    assert bool(private) == (module == f"{PACKAGE}.serve_internals"), private


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("from ray.serve import _private", id="an import"),
        pytest.param("from ray.serve._private import common", id="an import from a private module"),
        pytest.param("import ray._private.node", id="an import of a private module"),
        pytest.param("import ray\nray.serve._start()", id="an attribute"),
        pytest.param("import ray as r\nr._start()", id="an attribute of a renamed module"),
        pytest.param("from ray.serve import context as c\nc._get()", id="of a renamed name"),
        pytest.param("from ray import serve\nserve.a().b[0]._c", id="an attribute of a result"),
        pytest.param("def f():\n    from ray import serve\n    serve._a", id="a late import"),
    ],
)
def test_the_check_finds_a_private_name(source: str) -> None:
    assert private_names_of("ray", source)


def test_the_check_finds_no_private_name_where_there_is_none() -> None:
    source = "import ray, rayon\nray.__version__\nrayon._a\n_own = ray.init()\nself._ray._own"
    assert private_names_of("ray", source) == set()


def sets_environment(source: str) -> bool:
    """Whether a source writes to `os.environ`; reading from it is anybody's."""
    writes = r"os\.(putenv|unsetenv)\(|environ\.(setdefault|update|pop|clear)\(|environ\[[^]]+\] = "
    return re.search(rf"{writes}|del os\.environ|environ \|= ", source) is not None


@pytest.mark.parametrize("module", ALL)
def test_environment_variables_are_set_in_one_module_only(module: str) -> None:
    assert sets_environment(SOURCES[module]) == (module == f"{PACKAGE}.environment")


@pytest.mark.parametrize(
    "source",
    [
        'os.environ["A"] = "b"',
        'os.environ.setdefault("A", "b")',
        "os.environ.update(more)",
        "os.environ |= more",
        'del os.environ["A"]',
        'os.putenv("A", "b")',
    ],
)
def test_the_check_finds_what_sets_the_environment(source: str) -> None:
    assert sets_environment(source)


def loaded_with(modules: list[str], of: set[str]) -> set[str]:
    """Which of these packages a process has that imports the modules."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules.keys() & {of})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


def test_a_process_that_speaks_http_loads_neither_ray_nor_torch() -> None:
    """The same once more for real: what other packages import counts here too."""
    modules = [
        f"{PACKAGE}.http.api",
        f"{PACKAGE}.model.processor",
        f"{PACKAGE}.model.source",
        *modules_under("engine"),
    ]

    assert not loaded_with(modules, {"ray", "torch"})


def test_a_decoder_process_loads_only_what_it_needs() -> None:
    """There are several for each replica, and each is replaced when an image crashes it."""
    heavy = {"ray", "torch", "pydantic", "asyncio", "transformers"}

    assert not loaded_with([f"{PACKAGE}.model.decode_worker"], heavy)


@pytest.mark.slow
def test_a_generator_loads_nothing_of_transformers_models() -> None:
    """Nearly half of what it imports would be theirs, and no request is answered meanwhile."""
    modules = [f"{PACKAGE}.stages.language_model", f"{PACKAGE}.compute.cpu.device"]

    assert not loaded_with(modules, {"transformers.modeling_utils"})


@pytest.mark.slow
def test_engine_and_model_can_be_loaded_without_a_compiler_for_cpus() -> None:
    """A GPU machine has none."""
    modules = [*modules_under("engine", "model"), f"{PACKAGE}.compute.runner"]

    assert loaded_with(modules, {"torch", "numba", "llvmlite"}) == {"torch"}


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("import torch", id="a plain import"),
        pytest.param("import torch.nn.functional as F", id="an import of a part, renamed"),
        pytest.param("from torch.nn import Linear", id="an import from a part"),
        pytest.param("def f():\n    import torch", id="a late import"),
        pytest.param("from . import heavy", id="through a relative import"),
        pytest.param("from .heavy import x", id="through a relative import's name"),
        pytest.param("from blip2_serve.model import heavy", id="through a module of the package"),
        pytest.param("import blip2_serve.middle", id="through two modules of the package"),
        pytest.param("import blip2_serve.heavy_package.light", id="through a package's __init__"),
    ],
)
def test_the_check_finds_a_violation(source: str) -> None:
    made_up = {
        "blip2_serve.model.light": source,
        "blip2_serve.model.heavy": "import torch",
        "blip2_serve.middle": "from blip2_serve.model.heavy import x",
        "blip2_serve.heavy_package": "import torch",
        "blip2_serve.heavy_package.light": "",
    }

    assert "torch" in reached_by("blip2_serve.model.light", made_up)


def test_the_check_finds_no_violation_where_there_is_none() -> None:
    made_up = {"blip2_serve.light": "import torchless, json\nfrom blip2_serve.types import x"}

    assert reached_by("blip2_serve.light", made_up) == {"torchless", "json"}
