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

    from .target import Target

ROOM = 4 << 30
"""Address space beyond what the process has at rest: of a wild allocation the process must not die alone."""
WARMING = 3
"""Rounds over the sound inputs before anything counts: at first much is loaded."""
HANG = 60
"""Seconds after which it is written down where an input is still at."""
LONGEST = 2000
"""Characters of a sentence for people."""


def main(folder: Path, tasks: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    limit = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for task in tasks:
        name, first, end = task.split(":")
        (folder / name).mkdir()
        _search(name, range(int(first), int(end)), TARGETS[name](folder / name))


def _search(name: str, seeds: range, target: Target) -> None:
    sound = list(enumerate(target.seeds))
    for place, data in sound * WARMING:
        found = _tried(target, place, data)
        if found["outcome"] != "works":
            raise AssertionError(f"{name} does not work as it is: {found}")
    gc.collect()
    gc.freeze()  # what is there now stays: it is not looked through again for every input
    _say({"format": name, "honest": max(_tried(target, *each)["bytes"] for each in sound)})
    for seed in seeds:
        rng = Random(f"{name} {seed}")
        place = rng.randrange(len(sound))
        data = target.damage(target.seeds[place], rng)
        _say({"format": name, "seed": seed, "size": len(data)})
        faulthandler.dump_traceback_later(HANG, exit=False)
        found = _tried(target, place, data)
        faulthandler.cancel_dump_traceback_later()
        _say({"format": name, "seed": seed, **found})


def _tried(target: Target, seed: int, data: bytes) -> dict[str, Any]:
    """What becomes of an input: it works, is refused in a sentence, or there is a fault."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, start = _status("VmRSS"), time.process_time()
    try:
        target.take(seed, data)
        outcome, said = "works", ""
    except (InputError, RunError) as error:
        outcome, said = "refused", str(error)
        if "\n" in said or not said or len(said) > LONGEST or "Traceback" in said:
            outcome = "fault"
    except BaseException as error:  # whatever foreign code raises, panics of Rust too
        outcome, said = "fault", _told(error)
    seconds, peak = time.process_time() - start, _status("VmHWM")
    return {"outcome": outcome, "seconds": seconds, "bytes": max(0, peak - before), "said": said[:3000]}


def _told(error: BaseException) -> str:
    where, at = "", error.__traceback__
    while at is not None:
        where += f" {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        at = at.tb_next
    return f"{type(error).__name__}: {error} at{where[-400:]}"


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
