"""A contestant's process: `PYTHON loop.py NAME` reads a line of JSON, does what it asks, answers with a line.

{"do": "open", …} makes the contestant of NAME.py with these options: {"about": {…}}, or {"missing": package}.
{"do": "run", …} runs it: {"seconds": …, "token_ids": [[…], …], …}. {"do": "render", …} is for trimtab alone.
Whatever fails is {"error": sentence}. It ends with its standard input. Nothing here needs trimtab.
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
    """Serves until standard input ends."""
    # a group of its own: it is stopped whole between its turns, and ended by the system if its bench dies
    os.setpgid(0, 0)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print what they like
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
