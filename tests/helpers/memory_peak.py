"""Peak anonymous memory of a piece of code, without mapped files."""

from __future__ import annotations

import subprocess
import sys

MIB = 1 << 20

WATCHER_CODE = """
import sys, threading, time
from pathlib import Path
import torch

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10

class Watch(threading.Thread):
    def __enter__(self):
        self.before = self.peak = anonymous()
        self.watching = True
        self.start()
        return self

    def run(self):
        while self.watching:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.001)

    def __exit__(self, *error):
        self.watching = False
        self.join()
        print(max(self.peak, anonymous()) - self.before)
"""


def peak_memory(setup: str, code: str, *arguments: object) -> int:
    """Peak bytes that `code` adds, in a new interpreter after `setup`.

    `arguments` are in `sys.argv[1:]`. Memory is sampled every millisecond.
    """
    indented = "\n".join(f"    {line}" for line in code.strip().splitlines())
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{WATCHER_CODE}\n{setup}\nwith Watch(daemon=True):\n{indented}",
            *map(str, arguments),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(result.stdout)
