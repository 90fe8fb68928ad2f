"""A search in a process of its own: inputs one after the other, and what became of each, a line of JSON each.

`python -m …trial FOLDER FORMAT:FIRST:END …`. A seed is told before its input is tried, so that whoever reads
along knows which one a process died of, or is still at.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import resource
import sys
import time
import warnings
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from trimtab.kernels.common.errors import InputError, RunError

from .targets import TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .target import FuzzTarget

EXTRA_ADDRESS_SPACE = 4 << 30
"""Address space beyond what the process has at rest: of a wild allocation the process must not die alone."""
WARMUP_ROUNDS = 3
"""Rounds over the sound inputs before anything counts: at first much is loaded."""
HANG_SECONDS = 60
"""Seconds after which it is written down where an input is still at."""
MAX_MESSAGE = 2000
"""Characters of a sentence for people."""


def main(folder: Path, tasks: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    limit = _proc_status("VmSize") + EXTRA_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for task in tasks:
        name, first, end = task.split(":")
        (folder / name).mkdir()
        _search_format(name, range(int(first), int(end)), TARGETS[name](folder / name))


def _search_format(name: str, seeds: range, target: FuzzTarget) -> None:
    seed_inputs = list(enumerate(target.seeds))
    for index, data in seed_inputs * WARMUP_ROUNDS:
        result = _try_input(target, index, data)
        if result["outcome"] != "works":
            raise AssertionError(f"{name} does not work as it is: {result}")
    gc.collect()
    gc.freeze()  # what is there now stays: it is not looked through again for every input
    _print_json({"format": name, "baseline": max(_try_input(target, *each)["bytes"] for each in seed_inputs)})
    for seed in seeds:
        rng = Random(f"{name} {seed}")
        index = rng.randrange(len(seed_inputs))
        data = target.damage(target.seeds[index], rng)
        _print_json({"format": name, "seed": seed, "size": len(data)})
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=False)
        result = _try_input(target, index, data)
        faulthandler.cancel_dump_traceback_later()
        _print_json({"format": name, "seed": seed, **result})


def _try_input(target: FuzzTarget, seed: int, data: bytes) -> dict[str, Any]:
    """What becomes of an input: it works, is refused in a sentence, or there is a fault."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, start = _proc_status("VmRSS"), time.process_time()
    try:
        target.run(seed, data)
        outcome, message = "works", ""
    except (InputError, RunError) as error:
        outcome, message = "refused", str(error)
        if "\n" in message or not message or len(message) > MAX_MESSAGE or "Traceback" in message:
            outcome = "fault"
    except BaseException as error:  # whatever foreign code raises, panics of Rust too
        outcome, message = "fault", _describe_error(error)
    seconds, peak = time.process_time() - start, _proc_status("VmHWM")
    return {"outcome": outcome, "seconds": seconds, "bytes": max(0, peak - before), "message": message[:3000]}


def _describe_error(error: BaseException) -> str:
    trace, frame = "", error.__traceback__
    while frame is not None:
        trace += f" {Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return f"{type(error).__name__}: {error} at{trace[-400:]}"


def _proc_status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
