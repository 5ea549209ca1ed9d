"""Python and the packages, against the bounds of zerobert's own metadata."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator

from launch.doctor.finding import Finding

#: what a report of a fault should name
SHOWN = ("torch", "deepspeed", "transformers")


def installed(package: str) -> str | None:
    """The version of an installed package; None if it isn't there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages() -> Iterator[Finding]:
    """Python's version and that of every package that zerobert needs."""
    try:
        metadata = importlib.metadata.metadata("zerobert")
        requirements = importlib.metadata.requires("zerobert") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "problem", "zerobert is not installed", "pip install -e . in the checkout")
        return
    yield judge_python(platform.python_version(), metadata["Requires-Python"] or "")
    yield from judge_packages(requirements, installed)


def judge_python(version: str, bound: str) -> Finding:
    """Whether Python's version satisfies a bound such as >=3.10."""
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(bound).contains(version, prereleases=True):
        return Finding("python", "ok", version)
    return Finding("python", "problem", f"{version}, outside of {bound}", f"use a Python {bound}")


def judge_packages(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """A problem for each package that is missing or too old, else one line for all.

    Args:
        requirements: as in a package's metadata; those of extras are left out.
        version_of: installed version of a package; None if it is missing.
    """
    from packaging.requirements import Requirement

    needed = [
        requirement
        for requirement in map(Requirement, requirements)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    wrong = False
    for requirement in needed:
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong = True
            found = "missing" if version is None else f"{version}, outside of {requirement.specifier}"
            yield Finding(
                requirement.name, "problem", found, f"pip install '{requirement.name}{requirement.specifier}'"
            )
    if not wrong:
        shown = ", ".join(f"{name} {version_of(name)}" for name in SHOWN if version_of(name))
        yield Finding("packages", "ok", f"{len(needed)} within their bounds: {shown}")
