"""Worker processes of tensor parallelism: rank 0 starts, watches and ends them.

A worker ends when its standard input closes: when the engine is closed or its process has ended in any way. A
thread per worker waits for its exit; if one ends early, the others are killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import EngineConfig

STORE_ENV = "TRIMTAB_STORE"
"""Environment variable with the path of the c10d file store."""
EXIT_PEER_DIED = 75
"""Exit status of a worker that ended because another process died."""
GRACE_SECONDS = 2.0
"""Seconds to wait for a worker to exit before it is killed, and for the cause of a failure."""


class WorkerPool:
    """All ranks of an engine except 0, on this machine. `death_cause`: which one died first, and how."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = tempfile.mkdtemp(prefix="trimtab-")  # mode 0700
        self.store = str(Path(self._folder) / "store")
        self.death_cause: str | None = None
        self._closing = False
        self._callbacks: list[Callable[[str], None]] = []
        world_size = config.tensor_parallel_size
        self._processes = {rank: self._spawn(config, rank, world_size) for rank in range(1, world_size)}
        for rank, process in self._processes.items():
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Register callback(cause), called from another thread when a worker ends unexpectedly."""
        self._callbacks.append(callback)

    def wait_for_cause(self) -> str | None:
        """Wait up to GRACE_SECONDS for `death_cause`; None if no worker has died."""
        deadline = time.monotonic() + GRACE_SECONDS
        while not self.death_cause and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.death_cause

    def close(self) -> None:
        """End all workers; kill those that have not ended after GRACE_SECONDS."""
        self._closing = True
        for process in self._processes.values():
            assert process.stdin is not None, "stdin=PIPE makes a pipe"
            with suppress(OSError):
                process.stdin.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, config: EngineConfig, rank: int, world_size: int) -> subprocess.Popen[bytes]:
        rank_env = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            STORE_ENV: self.store,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "trimtab.engine.core.worker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), **rank_env},
        )
        assert process.stdin is not None, "stdin=PIPE makes a pipe"
        with suppress(BrokenPipeError):  # the worker is dead already; _watch reports it
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
            process.stdin.flush()
        return process

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if self._closing:
            return
        if status == EXIT_PEER_DIED:  # the watcher of the process that died first reports the cause
            time.sleep(GRACE_SECONDS / 2)
        if self.death_cause or self._closing:
            return
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self.death_cause = f"rank {rank} of {len(self._processes) + 1} {how}"
        for other in self._processes.values():
            other.kill()  # they would wait for the dead one
        for callback in self._callbacks:
            callback(self.death_cause)
