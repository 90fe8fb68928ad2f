"""The log writer: it never blocks, counts what it drops, and says once that the log is closed."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

import pytest
from trimtab.engine.utils.log_writer import LogWriter


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("trimtab", logging.INFO, "", 0, text, None, None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_fd, write_fd = os.pipe()
    yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        with contextlib.suppress(OSError):  # the test closed it
            os.close(fd)


def test_lines_are_written_in_order(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    for index in range(100):
        writer.emit(record(f"line {index} naïve \udc80"))
    assert writer.flush_for(10)
    lines = os.read(pipe[0], 1 << 16).decode().splitlines()
    assert lines == [f"line {index} naïve \\udc80" for index in range(100)]


def test_a_log_that_nobody_reads_blocks_no_caller_and_drops_are_counted(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1], max_lines=50)
    writer.emit(record("x" * (1 << 20)))  # more than a pipe holds: the thread waits in its write
    assert not writer.flush_for(0.05)
    for index in range(500):
        writer.emit(record(f"line {index}"))
    parts: list[bytes] = []

    def read() -> None:
        while data := os.read(pipe[0], 1 << 16):
            parts.append(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert writer.flush_for(10)
    os.close(pipe[1])
    reader.join(10)
    lines = b"".join(parts).decode().splitlines()
    assert lines[1:51] == [f"line {index}" for index in range(50)]
    assert lines[51:] == ["trimtab: 450 log lines were dropped; the log was not read"]


def test_a_closed_log_is_said_once(pipe: tuple[int, int]) -> None:
    errors_read, errors_write = os.pipe()
    os.close(pipe[0])
    writer = LogWriter(pipe[1], errors_write)
    for _ in range(20):
        writer.emit(record("line"))
        assert writer.flush_for(10)
    os.close(errors_write)
    message = os.read(errors_read, 1 << 16).decode()
    os.close(errors_read)
    assert message == "trimtab: the log cannot be written (Broken pipe); requests are no longer logged\n"
