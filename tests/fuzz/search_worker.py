"""Fuzz search worker: try inputs one after the other and print the results as JSON lines.

`python -m trimtab.tests.fuzz.search_worker FOLDER FORMAT:FIRST:END …`. Each seed is printed before its
input is tried, so that the reader knows which input crashed or hangs.
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
"""Bytes of address space beyond the initial ones, so that a wild allocation fails with an error."""
WARMUP_ROUNDS = 3
"""Rounds over the valid inputs before measuring, to load everything that is loaded lazily."""
HANG_SECONDS = 60
"""Seconds after which the traceback of a running input is dumped."""
MAX_MESSAGE = 2000
"""Maximum characters of a refusal."""


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
            raise AssertionError(f"{name}: an undamaged input does not work: {result}")
    gc.collect()
    gc.freeze()  # skip the present objects in the collection after every input
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
    """Try an input. Its outcome is "works", "refused" (in one sentence) or "fault"."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
    before, start = _proc_status("VmRSS"), time.process_time()
    try:
        target.run(seed, data)
        outcome, message = "works", ""
    except (InputError, RunError) as error:
        outcome, message = "refused", str(error)
        if "\n" in message or not message or len(message) > MAX_MESSAGE or "Traceback" in message:
            outcome = "fault"
    except BaseException as error:  # includes Rust panics
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
    """A value from /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
