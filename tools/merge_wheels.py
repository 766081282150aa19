# SPDX-License-Identifier: Apache-2.0
"""Merge wheels that differ only in the engine's modules into one wheel that has all the modules.

Usage: python tools/merge_wheels.py DESTINATION WHEEL WHEEL...
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path


def merge(wheels: list[Path], destination: Path) -> Path:
    """Write the union of `wheels` to the folder `destination`; a file that is in several must be the same in each."""
    names = sorted({wheel.name for wheel in wheels})
    if len(names) != 1:
        raise SystemExit(f"The wheels differ in version, Python or platform: {', '.join(names)}")
    files: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith(".dist-info/RECORD"):
                    record_name = name
                elif files.setdefault(name, content) != content:
                    raise SystemExit(f"{name} differs between the wheels")
    record = [f"{name},{_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[record_name] = "".join([*record, f"{record_name},,\n"]).encode()

    destination.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(destination / names[0], "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            # A fixed time makes the file reproducible; 0644 is what pip gives modules too.
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return destination / names[0]


def _digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(merge([Path(argument) for argument in sys.argv[2:]], Path(sys.argv[1])))
