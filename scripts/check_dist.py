"""Look into the wheel and the source distribution before anybody installs them; `make dist`.

    python scripts/check_dist.py dist               # what `python -m build` made
    python scripts/check_dist.py dist --tag v0.2.0  # and that this tag may be published

The source distribution must hold exactly what git tracks. The wheel must hold the package's files,
the recipes and the license, nothing else, and be the same to the byte as one that is built from the
checkout.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")

Files = dict[str, bytes]
"""Contents by path."""


def version_of(package: str) -> str:
    """Return the version that the text of the package's `__init__.py` states.

    >>> version_of('__version__ = "1.2.3"')
    '1.2.3'
    """
    found = re.findall(r'^__version__ = "([^"]+)"$', package, re.MULTILINE)
    if len(found) != 1:
        raise SystemExit(f"src/proxstep/__init__.py states {len(found)} versions")
    return found[0]


def expected_in_wheel(tracked: set[str], version: str) -> set[str]:
    """Return the paths of a wheel, by the files that git tracks.

    >>> sorted(expected_in_wheel({"src/proxstep/a.py", "recipes/b.yaml", "tests/c.py"}, "1"))[-2:]
    ['proxstep/a.py', 'proxstep/recipes/b.yaml']
    """
    package = {name[4:] for name in tracked if name.startswith("src/proxstep/")}
    recipes = {f"proxstep/{name}" for name in tracked if name.startswith("recipes/")}
    return package | recipes | {f"proxstep-{version}.dist-info/{name}" for name in METADATA}


def differences(what: str, found: set[str], wanted: set[str]) -> list[str]:
    """Return what is missing or too many, each in words."""
    missing = [f"{what} lacks {name}" for name in sorted(wanted - found)]
    return missing + [f"{what} should not hold {name}" for name in sorted(found - wanted)]


def unequal(found: Files, other: Files) -> list[str]:
    """Return how a wheel differs from the one that the checkout gives."""
    names = sorted(found.keys() | other.keys())
    changed = [name for name in names if found.get(name) != other.get(name)]
    return [f"the wheel differs from the checkout's in {name}" for name in changed]


def unreleasable(tag: str, version: str, changelog: str) -> list[str]:
    """Return why a tag may not be published; nothing where it may."""
    found = [] if tag == f"v{version}" else [f"the tag {tag} is not v{version}"]
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$"
    if not re.search(heading, changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no section [{version}] with a date")
    return found


def wheel_files(path: Path) -> Files:
    """Return what a wheel holds."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_names(path: Path) -> set[str]:
    """Return the paths in a source distribution, below its one folder."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    return {name.partition("/")[2] for name in (member.name for member in members)}


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of a kind."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} holds {len(found)} files {pattern}: clean it, then build")
    return found[0]


def problems(folder: Path, tag: str | None) -> list[str]:
    """Return everything that is wrong with what was built."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    tracked = set(listed.stdout.decode().splitlines())
    version = version_of((ROOT / "src/proxstep/__init__.py").read_text(encoding="utf-8"))
    wheel = wheel_files(only(folder, f"proxstep-{version}-py3-none-any.whl"))
    source = only(folder, f"proxstep-{version}.tar.gz")
    found = differences("the wheel", set(wheel), expected_in_wheel(tracked, version))
    found += differences("the source distribution", sdist_names(source), tracked | {"PKG-INFO"})
    with tempfile.TemporaryDirectory() as built:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", built, str(ROOT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found += unequal(wheel, wheel_files(only(Path(built), "*.whl")))
    if tag is not None:
        found += unreleasable(tag, version, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Print what is wrong; the status is 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", help="also check that it may be published under this tag")
    arguments = parser.parse_args()
    found = problems(arguments.folder, arguments.tag)
    print("\n".join(found) if found else f"{arguments.folder}: in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
