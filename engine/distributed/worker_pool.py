"""The worker processes of tensor parallelism, as the first process starts and ends them.

They end when their standard input does: when the engine is closed, and when its process is gone, however it
went. One that ends before is noticed by a thread that waits for it; then none of them is of use any more.
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
"""The environment variable that names the file by which the processes find each other."""
EXIT_PEER_DIED = 75
"""The exit status of a process that ended because another was gone."""
GRACE_SECONDS = 2.0
"""Seconds that a process gets to end by itself, and that the cause of a failure is looked for."""


class WorkerPool:
    """All ranks of an engine but the first, on this machine. `death_cause`: which of them died, and how."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = tempfile.mkdtemp(prefix="trimtab-")  # none but this user may look into it
        self.store = str(Path(self._folder) / "store")
        self.death_cause: str | None = None
        self._closing = False
        self._callbacks: list[Callable[[str], None]] = []
        world_size = config.tensor_parallel_size
        self._processes = {rank: self._spawn(config, rank, world_size) for rank in range(1, world_size)}
        for rank, process in self._processes.items():
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Calls tell(cause) when a process ends that should not have; from another thread."""
        self._callbacks.append(callback)

    def wait_for_cause(self) -> str | None:
        """Which process died first, for a failure that may be due to it; None when all live."""
        deadline = time.monotonic() + GRACE_SECONDS
        while not self.death_cause and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.death_cause

    def close(self) -> None:
        """Ends all of them, at the latest after some seconds."""
        self._closing = True
        for process in self._processes.values():
            assert process.stdin is not None, "a worker has a pipe"
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
        assert process.stdin is not None, "it was asked for a pipe"
        with suppress(BrokenPipeError):  # it is dead already, which is noticed by whoever waits for it
            process.stdin.write(json.dumps(asdict(config)).encode() + b"\n")
            process.stdin.flush()
        return process

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if self._closing:
            return
        if status == EXIT_PEER_DIED:  # its death has a cause, which another thread tells
            time.sleep(GRACE_SECONDS / 2)
        if self.death_cause or self._closing:
            return
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self.death_cause = f"rank {rank} of {len(self._processes) + 1} {how}"
        for other in self._processes.values():
            other.kill()  # so that nobody waits for them
        for callback in self._callbacks:
            callback(self.death_cause)
