"""The rules of the house (CONTRIBUTING.md says what they are for). Each offender is named, with a remedy."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Floor of every module below pipeline/, by its longest known prefix. A door may import everything but another door.
FLOORS = {
    "pipeline": 0,
    "pipeline.config": 0,
    "pipeline.door": 0,
    "pipeline.builtin_model": 0,
    "pipeline.slurm_job": 0,
    "pipeline.threads": 0,
    "pipeline.data": 1,
    "pipeline.sink": 1,
    "pipeline.checkpoints": 2,
    "pipeline.planning": 2,
    "pipeline.doctor": 2,
    "pipeline.report": 2,
    "pipeline.training": 3,
    "pipeline.methods": 4,
    "pipeline.curation": 4,
    "pipeline.realignment": 4,
    "pipeline.evaluation": 4,
    "pipeline.chain": 5,
    "pipeline.train": 6,
    "pipeline.curate": 6,
    "pipeline.realign": 6,
    "pipeline.assess": 6,
    "pipeline.measure": 6,
    "tools": 6,
    "tools.bench": 5,
}
WITHOUT_DEEPSPEED = ("data", "curation", "realignment", "evaluation", "checkpoints")
MAX_LINES = 400
BUILT_FROM_SOURCE = ("flash_attn_interface",)  # no package index has them


@functools.cache
def files(*endings: str) -> list[Path]:
    """Every file of the repository, tracked or about to be, that has one of these endings (none: all of them)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    paths = [ROOT / name for name in sorted(set(listed)) if name]
    return [path for path in paths if path.is_file() and (not endings or path.suffix in endings)]


def below(*folders: str) -> list[Path]:
    return [path for path in files(".py") if path.relative_to(ROOT).parts[0] in folders]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, inside functions too: `from a import b` gives a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def floor(module: str) -> int | None:
    """The floor of a module; None outside the house, and below pipeline/ where no floor is given."""
    while module:
        if module in FLOORS and (module != "pipeline"):
            return FLOORS[module]
        module = module.rpartition(".")[0]
    return None


def test_every_module_has_a_floor() -> None:
    offenders = [
        f"{at(path, 1)}: stands on no floor; move it to a folder that has one, or add it to FLOORS and CONTRIBUTING.md"
        for path in below("pipeline", "tools")
        if module_of(path) != "pipeline" and floor(module_of(path)) is None
    ]
    assert not offenders, "\n".join(offenders)


def test_nothing_imports_upwards() -> None:
    offenders = []
    for path in below("pipeline", "tools"):
        here = floor(module_of(path)) or 0
        for line, name in imports(path):
            there = floor(name)
            if there is not None and (there > here or (there == here == FLOORS["tools"])):
                offenders.append(f"{at(path, line)}: imports {name} from above; move what is shared down")
            elif name.partition(".")[0] == "tests":
                offenders.append(f"{at(path, line)}: imports {name}; the product does not know its tests")
    assert not offenders, "\n".join(offenders)


def test_methods_do_not_import_each_other() -> None:
    offenders = []
    for path in below("pipeline"):
        module = module_of(path)
        for line, name in imports(path):
            other = re.match(r"pipeline\.methods\.(\w+)", name)
            if module.startswith("pipeline.methods.") and other and other[1] != module.split(".")[2]:
                offenders.append(
                    f"{at(path, line)}: imports another method ({name}); move what both need to pipeline/training/"
                )
    assert not offenders, "\n".join(offenders)


def test_deepspeed_is_only_imported_where_training_happens() -> None:
    offenders = [
        f"{at(path, line)}: imports {name}; this floor works without deepspeed: go through pipeline/training/"
        for path in below("pipeline")
        if path.relative_to(ROOT).parts[1] in WITHOUT_DEEPSPEED
        for line, name in imports(path)
        if name.partition(".")[0] == "deepspeed"
    ]
    assert not offenders, "\n".join(offenders)


def test_only_zero3_touches_partitioned_parameters() -> None:
    # What DeepSpeed hangs on a partitioned parameter (ds_tensor, ds_status ...), and its ways to read and write it.
    partitioned = re.compile(
        r"ds_(tensor|status|id|shape|numel|process_group|persist|secondary_tensor|active_sub_modules)"
    )
    access = re.compile(r"GatheredParameters|safe_(get|set)_\w+")
    offenders = []
    for path in below("pipeline", "tools"):
        if path == ROOT / "pipeline/training/zero3.py":
            continue
        for node in ast.walk(tree(path)):
            name = ""
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value  # getattr(parameter, "ds_numel")
            elif isinstance(node, ast.alias):
                name = node.name.rpartition(".")[2]
            if partitioned.fullmatch(name) or access.fullmatch(name):
                offenders.append(
                    f"{at(path, node.lineno)}: uses {name}; add a function to pipeline/training/zero3.py, call that"
                )
    assert not offenders, "\n".join(offenders)


def test_no_file_beside_the_doors_shadows_a_module() -> None:
    # The deepspeed launcher and `python pipeline/train.py` put pipeline/ first on the path of every library.
    installed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if set(distributions) != {"surgery-pipeline"}
    }
    offenders = [
        f"{path.relative_to(ROOT)}: would shadow the module {path.stem} for every library; rename it"
        for folder in ("pipeline", "tools")
        for path in sorted((ROOT / folder).iterdir())
        if path.suffix in ("", ".py") and path.stem in installed | sys.stdlib_module_names
    ]
    assert not offenders, "\n".join(offenders)


def test_imports_are_absolute() -> None:
    offenders = [
        f"{at(path, node.lineno)}: relative import; write it from the repository's root (from pipeline.x import y)"
        for path in files(".py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not offenders, "\n".join(offenders)


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    declared = {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}
    distributions = importlib.metadata.packages_distributions()
    offenders = []
    for path in below("pipeline", "tools"):
        for line, name in imports(path):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in ("pipeline", "tools", *BUILT_FROM_SOURCE):
                continue
            providers = {each.lower().replace("_", "-") for each in distributions.get(top, [top])}
            if not providers & declared:
                offenders.append(f"{at(path, line)}: imports {top}; declare {sorted(providers)} in pyproject.toml")
    assert not offenders, "\n".join(offenders)


def test_files_can_be_read_in_one_go() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(".py")}
    offenders = [
        f"{at(path, length)}: {length} lines, more than {MAX_LINES}; split it where the second idea begins"
        for path, length in lengths.items()
        if length > MAX_LINES
    ]
    assert not offenders, "\n".join(offenders)


def test_no_path_of_a_machine_and_no_package_host() -> None:
    # Put together here so that this file does not hold what it looks for.
    machine = re.compile("(?<![.\\w])/" + "(work|farm|root|home|Users|opt|mnt)" + "/")
    host = re.compile(
        "https?://" + r"(py[a-z]+|files[.]py[a-z]+|download[.]py[a-z]+|registry[.]np[a-z]+|deb[.]deb[a-z]+)[.]"
    )
    offenders = []
    for path in files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(lines, 1):
            if found := machine.search(line) or host.search(line):
                offenders.append(
                    f"{at(path, number)}: {found[0]} holds on one machine only; use a relative path or a flag"
                )
    assert not offenders, "\n".join(offenders)


def test_the_tree_names_every_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    offenders = [
        f"{path.relative_to(ROOT)}: not in CONTRIBUTING.md; give it a line in the tree"
        for path in files(".py", ".json", ".yaml", ".sh")
        if path.relative_to(ROOT).parts[0] in ("pipeline", "tools", "ds_configs", "slurm")
        and path.name != "__init__.py"
        and not re.search(rf"(?<![\w-]){re.escape(path.name)}\b", text)
    ]
    assert not offenders, "\n".join(offenders)
