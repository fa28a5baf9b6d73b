"""Python and the packages: what this project's metadata asks for, what is installed, and whether it imports."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import site
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.doctor.finding import FAILED, OK, WARNING, Finding
from pipeline.doctor.probing import Answers

PROJECT = "surgery-pipeline"
ROOT = Path(__file__).resolve().parents[2]
SLOW_IMPORT = 60.0  # seconds; a shared file system that is this slow costs every start of every rank


def python() -> Iterator[Finding]:
    """The interpreter against `requires-python`."""
    version = platform.python_version()
    found, same = f"{version} ({sys.executable})", {"python": version}
    asked = importlib.metadata.metadata(PROJECT)["Requires-Python"] if _installed() else ""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        yield Finding("python", WARNING, f"{found}; packaging is missing, so not compared", "make setup", same)
        return
    if version in SpecifierSet(asked):
        yield Finding("python", OK, found, same=same)
    else:
        yield Finding("python", FAILED, f"{found}, and {PROJECT} asks for {asked}", "make setup PYTHON=...", same)


def required() -> list[str]:
    """The project's requirements as its metadata has them, without those of extras; none if it is not installed."""
    return [each for each in _asked() if "extra ==" not in each]


def extra(distribution: str) -> str:
    """The lowest version that an extra asks for: '2.8' of `flash-attn>=2.8; extra == "gpu"`."""
    for each in _asked():
        if _name(each) == distribution and (version := re.search(r">=\s*([\d.]+)", each)):
            return version[1]
    return "0"


def requirements() -> Iterator[Finding]:
    """Every requirement against what is installed."""
    if not _installed():
        yield Finding("packages", FAILED, f"{PROJECT}, which names them, is not installed", "make setup")
        return
    installed: dict[str, str] = {}
    bad = []
    for requirement in required():
        name = _name(requirement)
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            bad.append(Finding(f"package {name}", FAILED, f"not installed ({requirement})", "make setup"))
            continue
        if not _satisfies(requirement, installed[name]):
            found = f"{installed[name]}, and {PROJECT} asks for {requirement}"
            bad.append(Finding(f"package {name}", FAILED, found, f"pip install -c constraints.txt '{requirement}'"))
    shown = ", ".join(f"{name} {installed[name]}" for name in sorted(installed, key=_first) if _first(name) == 0)
    yield Finding("packages", OK, f"{len(installed)} of {len(installed) + _absent(bad)}: {shown}", same=installed)
    yield from bad


def _first(name: str) -> int:
    return 0 if name in ("torch", "transformers", "deepspeed", "peft", "accelerate") else 1


def _absent(bad: Sequence[Finding]) -> int:
    return sum(each.found.startswith("not installed") for each in bad)


def pins() -> Iterator[Finding]:
    """What is installed against constraints.txt, the versions that the tests run with."""
    pinned = ROOT / "constraints.txt"
    if not pinned.exists():
        return
    other = []
    for line in pinned.read_text(encoding="utf-8").splitlines():
        name, _, pin = line.partition("==")
        try:
            version = importlib.metadata.version(name) if pin else ""
        except importlib.metadata.PackageNotFoundError:
            continue  # tools for development need not be on a node; what must be is a requirement
        if version.partition("+")[0] != pin:
            other.append(f"{name} {version} (tested with {pin})")
    if other:
        more = f" and {len(other) - 6} more" if len(other) > 6 else ""
        remedy = "pip install -c constraints.txt -e ."
        yield Finding("pinned versions", WARNING, f"others than tested: {', '.join(other[:6])}{more}", remedy)
    else:
        yield Finding("pinned versions", OK, "as in constraints.txt")


def user_site() -> Iterator[Finding]:
    """Packages of the user's own folder (~/.local) that hide or complete those of the environment."""
    folder = Path(site.getusersitepackages())
    own = []
    if site.ENABLE_USER_SITE and folder.is_dir():
        for name in map(_name, required()):
            try:
                found = Path(str(importlib.metadata.distribution(name).locate_file("")))
            except importlib.metadata.PackageNotFoundError:
                continue
            if found.resolve() == folder.resolve():
                own.append(name)
    if own:
        remedy = "export PYTHONNOUSERSITE=1, and install into the environment"
        yield Finding("user packages", WARNING, f"{', '.join(own)} come from {folder}", remedy)
    else:
        yield Finding("user packages", OK, "none in use")


def code() -> Iterator[Finding]:
    """This checkout, so that nodes that run different code are named."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    short = digest.hexdigest()[:12]
    yield Finding("code", OK, f"pipeline/ is {short}", same={"code": short})


def modules() -> list[str]:
    """The module to import of each requirement that is installed; torch first, which most others import."""
    provided: dict[str, list[str]] = {}
    for module, distributions in importlib.metadata.packages_distributions().items():
        for distribution in distributions:
            provided.setdefault(_normal(distribution), []).append(module)
    chosen = []
    for name in map(_name, required()):
        own = [each for each in provided.get(name, []) if each.isidentifier() and not each.startswith("_")]
        if own:
            chosen.append(name if name in own else sorted(own)[0])
    return sorted(chosen, key=lambda module: (module != "torch", module))


def imports(answers: Answers) -> Iterator[Finding]:
    """What happened when a process of its own imported them."""
    steps = {step[len("import ") :]: answer for step, answer in answers.items() if step.startswith("import ")}
    seconds = sum(answer.get("seconds", 0.0) for answer in steps.values())
    good = [name for name, answer in steps.items() if "error" not in answer]
    if seconds > SLOW_IMPORT:
        remedy = "keep the environment on a disk of the node, or in a container image"
        yield Finding("imports", WARNING, f"{len(good)} modules took {seconds:.0f} s", remedy)
    else:
        yield Finding("imports", OK, f"{len(good)} modules in {seconds:.1f} s")
    for name, answer in steps.items():
        if "error" in answer:
            yield Finding(f"import {name}", FAILED, answer["error"], f"reinstall the package of {name}: make setup")
    if "start" in answers:
        yield Finding("imports", FAILED, answers["start"]["error"], "this Python does not start another one")


def _installed() -> bool:
    return any(importlib.metadata.distributions(name=PROJECT))


def _asked() -> list[str]:
    return (importlib.metadata.requires(PROJECT) or []) if _installed() else []


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return _normal(found[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _satisfies(requirement: str, version: str) -> bool:
    """Whether a version is in the range; true where packaging, itself a requirement, is missing."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return True
    return Requirement(requirement).specifier.contains(version, prereleases=True)
