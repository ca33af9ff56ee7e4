"""Looks up the packages of a constraints file among known vulnerabilities; skips where that cannot be asked.

    python .ci/audit.py constraints.txt

Status 1 where one is known to be vulnerable.
"""

import json
import subprocess
import sys


def main(path: str) -> int:
    """Run pip-audit, whose status does not tell a vulnerable package from a network that is not there."""
    command = [sys.executable, "-m", "pip_audit", "-r", path, "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        print(f"audit skipped: pip-audit could not ask ({reason})")
        return 0
    known = [package for package in found if "skip_reason" not in package]
    if not known:
        # As behind a mirror that has files only.
        print(f"audit skipped: none of {len(found)} packages is known to the service that was asked")
        return 0
    vulnerable = [package for package in known if package["vulns"]]
    for package in vulnerable:
        for flaw in package["vulns"]:
            fixed = ", ".join(flaw["fix_versions"]) or "none yet"
            print(f"{package['name']} {package['version']}: {flaw['id']}, fixed in {fixed}")
    print(f"audited {len(known)} packages, {len(found) - len(known)} unknown, {len(vulnerable)} vulnerable")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
