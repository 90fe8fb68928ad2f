"""Fixtures and options shared by all tests."""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from trimtab.engine.engine import Engine
from trimtab.models.loader.download import pull_demo

from .helpers.tiny_model import TinyModel, is_idle

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent
SMOKE = {
    "test_structure.py",
    "kernels/linear/test_weight_formats.py",
    "kernels/steering/test_closed_form.py",
    "kernels/steering/test_top_k_top_p.py",
    "kernels/steering/test_step.py",
    "models/test_decoder.py",
    "models/chat/test_prompts.py",
    "models/tokenizer/test_tokenizer.py",
    "engine/test_engine.py",
    "engine/test_trace.py",
    "engine/methods/test_methods.py",
    "engine/scheduling/test_block_manager.py",
    "engine/server/test_app.py",
    "tools/cli/test_main.py",
    "tools/commands/test_generate.py",
}
"""Files run by `pytest -m smoke`: some of each folder, in less than a minute."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption(
        "--emulate", metavar="ARCH", help="run kernels as compiled for sm_80 or sm_90, where there is no GPU"
    )


def pytest_configure() -> None:
    """Restore SIGINT: a shell's background job ignores it, and so would all processes that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the smoke tests. Without --long, deselect tests marked long."""
    for item in items:
        if item.path.relative_to(TESTS).as_posix() in SMOKE:
            item.add_marker(pytest.mark.smoke)
    if config.getoption("--long"):
        return
    long_items = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long_items)
    items[:] = [item for item in items if item not in long_items]


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder: downloaded once, then read from the cache."""
    return pull_demo()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with tied embeddings; seven rows of them have no token."""
    return TinyModel().write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(str(tiny_folder), kv_cache_memory="8MiB")


@pytest.fixture
def gc_disabled() -> Iterator[None]:
    """Collect garbage, then disable its collection during the test.

    Collecting an earlier test's objects may block in finalisers, where Python drops an interrupt.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def tiny(tiny_engine: Engine) -> Iterator[Engine]:
    """An engine on the tiny model, which must be idle before and after the test."""
    assert is_idle(tiny_engine)
    yield tiny_engine
    assert is_idle(tiny_engine), "the test left requests or blocks behind"
