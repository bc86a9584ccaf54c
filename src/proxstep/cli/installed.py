"""What is installed: versions, and what an extra of ours would miss."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

import proxstep
from proxstep.config.releases import beside_trl

ENGINE_EXTRAS = {"local": "train", "trl": "trl", "verl": "verl", "vllm": "vllm"}
"""By what is to run, vllm being `rollout.engine vllm`: the extra that it needs."""
_BUILT_ON = ("torch", "transformers", "trl", "verl")


def versions() -> str:
    """Return the versions of proxstep and of what it builds on."""
    found = ", ".join(f"{name} {installed(name) or 'not installed'}" for name in _BUILT_ON)
    return f"proxstep {proxstep.__version__} ({found})"


def missing_for(extra: str) -> list[str]:
    """Return what an extra of ours asks for and is not there, each in words.

    >>> missing_for("no-such-extra")
    []
    """
    found = []
    for name, wanted, of in map(_parsed, requires("proxstep") or ()):
        if of != extra:
            continue
        if name == "proxstep":
            below = re.findall(r"\[(.*)\]", wanted)
            found += [text for part in below[0].split(",") for text in missing_for(part)]
        elif (has := installed(name)) is None:
            found.append(f"no {name}")
        elif not _fits(has, wanted):
            found.append(f"{name} {has} is not {wanted}")
    return list(dict.fromkeys(found))


def missing_for_engine(engine: str, extra: str) -> str:
    """Return what an engine misses and the remedy, in a sentence; empty where it is ready."""
    if engine == "verl" and (reason := beside_trl()):
        return reason
    missing, local = missing_for(extra), missing_for("train")
    if not missing:
        return ", and ".join(_verl_needs()) if engine == "verl" else ""
    if engine != "local" and local:  # a long list, said already
        missing = ["what engine local misses", *(text for text in missing if text not in local)]
    remedy = f'pip install "proxstep[{extra}]"'
    if engine == "trl" and installed("verl"):
        remedy += " in an environment of its own, since verl 0.9 does not load a model beside it"
    return f"{', '.join(missing)}; {remedy}"


def _parsed(requirement: str) -> tuple[str, str, str]:
    """Return the package, what is wanted of it, and the extra that wants it."""
    wanted, _, marker = requirement.partition(";")
    name, rest = re.match(r"([\w.-]+)(.*)", wanted.strip()).groups()  # type: ignore[union-attr]
    of = re.search(r"extra == ['\"]([\w-]+)", marker)
    return name, rest.strip(), of.group(1) if of else ""


def _fits(found: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # of the core alone: without it transformers is missing too, and is named
        return True
    return SpecifierSet(wanted).contains(found, prereleases=True)


def installed(package: str) -> str | None:
    """Return the version of a package, None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _verl_needs() -> list[str]:
    """Return what a run of verl by a recipe needs beside our extra, and is not here."""
    import torch

    found = []
    if not torch.cuda.is_available():
        found.append("torch sees no GPU (a checkout's tests run verl on a CPU: docs/verl-cpu.md)")
    if installed("vllm") is None:
        found.append('no vLLM, with which verl samples; pip install "verl[vllm]==0.9.1"')
    return found


def device() -> str:
    """Return what `device auto` is here; imports torch."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"device auto: cuda ({', '.join(names)})"
    if torch.backends.mps.is_available():
        return "device auto: cpu; mps is there, but nothing was tried on it"
    return "device auto: cpu; torch sees no accelerator"
