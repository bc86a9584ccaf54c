"""Known vulnerabilities of what is installed: red for a finding, a note where none can be asked.

    python scripts/audit.py

A service that is down, or a package index without vulnerabilities, is no reason to be red; but then
the last line says of how many packages nothing is known.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

SERVICES = ("pypi", "osv")
SECONDS = 300


def asked(service: str) -> list[dict[str, Any]]:
    """Return what a service says of each package, nothing where it cannot be reached."""
    command = [sys.executable, "-m", "pip_audit", "-f", "json", "-s", service, "--timeout", "15"]
    command += ["--progress-spinner", "off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        return json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return []


def verdict(packages: list[dict[str, Any]]) -> tuple[int, str]:
    """Return the exit status and the last line of an audit.

    >>> verdict([{"name": "a", "vulns": []}, {"name": "b", "skip_reason": "not found"}])
    (0, 'audit: 1 packages without a known vulnerability; of 1 others nothing is known: b')
    >>> verdict([])
    (0, 'audit: NOT DONE: no vulnerability service can be reached from here')
    """
    found = [package for package in packages if package.get("vulns")]
    if found:
        lines = [
            f"{package['name']} {package.get('version', '')}: {each.get('id')}, fixed in "
            f"{', '.join(each.get('fix_versions') or ['no version'])}"
            for package in found
            for each in package["vulns"]
        ]
        return 1, "\n".join([*lines, f"audit: {len(found)} packages have known vulnerabilities"])
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    num_known = len(packages) - len(skipped)
    if not num_known:
        return 0, "audit: NOT DONE: no vulnerability service can be reached from here"
    line = f"audit: {num_known} packages without a known vulnerability"
    if skipped:
        line += f"; of {len(skipped)} others nothing is known: {', '.join(skipped)}"
    return 0, line


def main() -> int:
    """Ask one service after the other until one knows something."""
    if subprocess.run([sys.executable, "-m", "pip_audit", "--version"], stdout=2).returncode:
        print("audit: pip-audit is not installed; run make setup")
        return 1
    status, line = 0, ""
    for service in SERVICES:
        status, line = verdict(asked(service))
        if status or "NOT DONE" not in line:
            break
    print(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
