"""The program of a process that holds a part of a model: `python -m trimtab.engine.core.worker_main`, see
`workers`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from ...kernels.common.errors import InputError, RunError
from ...kernels.distributed.communicator import LostPeerError
from ..config import EngineConfig
from ..distributed.worker_pool import LOST, STORE
from .engine_core import Core


def main() -> int:
    """Reads a config from standard input, and holds its part until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process decides
    config = EngineConfig(**json.loads(_line()))
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        Core(config)
    except LostPeerError:
        return LOST
    except (InputError, RunError) as error:
        print(f"trimtab: rank {os.environ['RANK']}: {error}", file=sys.stderr)
    return 1


def _line() -> bytes:
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(0, 1 << 16) or sys.exit(LOST)
    return text


def _end_with_the_first() -> None:
    while os.read(0, 1):
        pass
    shutil.rmtree(Path(os.environ[STORE]).parent, ignore_errors=True)  # the first may have been killed
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
