"""The worker process of tensor parallelism: `python -m trimtab.engine.core.worker_main`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from ...kernels.common.errors import InputError, RunError
from ...kernels.distributed.communicator import WorkerDiedError
from ..config import EngineConfig
from ..distributed.worker_pool import EXIT_PEER_DIED, STORE_ENV
from .engine_core import EngineCore


def main() -> int:
    """Read a config from standard input and run a tensor-parallel worker until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals all processes; rank 0 decides
    config = EngineConfig(**json.loads(_read_line()))
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        EngineCore(config)
    except WorkerDiedError:
        return EXIT_PEER_DIED
    except (InputError, RunError) as error:
        print(f"trimtab: rank {os.environ['RANK']}: {error}", file=sys.stderr)
    return 1


def _read_line() -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(0, 1 << 16) or sys.exit(EXIT_PEER_DIED)
    return text


def _exit_with_parent() -> None:
    while os.read(0, 1):
        pass
    shutil.rmtree(Path(os.environ[STORE_ENV]).parent, ignore_errors=True)  # rank 0 may have been killed
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
