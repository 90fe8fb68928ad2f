"""Main loop of a runner process: `PYTHON main_loop.py NAME` answers each line of JSON with a line of JSON.

{"do": "open", …} creates the Peer of NAME.py with these options: {"about": {…}}, or {"missing": package}.
{"do": "run", …} decodes: {"seconds": …, "token_ids": [[…], …], …}. {"do": "render", …} is for trimtab only.
A failure is {"error": sentence}. The process ends with its standard input. It does not import trimtab.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT_DIR = Path(__file__).resolve().parent


def main(name: str) -> None:
    """Answer requests until standard input ends."""
    # A new process group: SIGSTOP reaches the children, too, and the kernel ends the group if the bench dies.
    os.setpgid(0, 0)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Libraries may print to stdout.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != SCRIPT_DIR]
    runner: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        task = message.pop("do")
        try:
            if task == "open":
                runner = _load_module(name).Peer(**message)
                reply = {"about": runner.about}
            elif task == "render":
                reply = {"prompts": runner.render(**message)}
            else:
                start = time.perf_counter()
                reply = runner.run(**message)
                reply["seconds"] = time.perf_counter() - start
        except ModuleNotFoundError as error:
            reply = {"missing": error.name}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=out, flush=True)


def _load_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"peer_{name}", SCRIPT_DIR / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ValueError(f"unknown contestant {name!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
