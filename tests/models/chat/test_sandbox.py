"""Isolation and resource limits of the template sandbox, with lower limits than the defaults."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.chat.prompts import render_branches
from trimtab.models.chat.renderer import SandboxRenderer
from trimtab.models.chat.sandbox_process import PASSED_ENV_VARS, SANDBOX_SCRIPT, LimitError, SandboxLimits
from trimtab.models.chat.template import ChatTemplate

from ...helpers.chat_templates import PLAIN
from ...helpers.polling import wait_until
from .test_prompts import PLAIN_TOKENIZER, USER_TURN, user_message

SHORT = SandboxLimits(cpu_seconds=0.3, wall_seconds=30, memory_bytes=128 << 20, output_bytes=1 << 20)
CONSTANT_BOMBS = {
    "a great number": ("{{ 7 ** (10 ** 9) }}", "used more than 0.3 s of CPU time"),
    "brackets": ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "is not valid Jinja: RecursionError"),
}
"""Constant expressions that jinja2 evaluates when it compiles the template."""
BOMBS = {
    "loops": (
        "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
        "of CPU time",
    ),
    "a great number": ("{{ (7 + messages | length) ** (10 ** 9) }}", "of CPU time"),
    "a long text": ("{{ messages[0].role * 10 ** 10 }}", "128 MiB of memory"),
    "a wide field": ("{{ '%9999999999d' % 1 }}", "128 MiB of memory"),
    "a padded text": ("{{ 'a' | center(10 ** 10) }}", "128 MiB of memory"),
    "doubling": (
        "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "128 MiB of memory",
    ),
    "lists": ("{% for i in range(9999) %}{{ range(99999) | list | length }}{% endfor %}", "of CPU time"),
    "much text": ("{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}", "wrote more than 1 MiB"),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "of CPU time",
    ),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a long error": ("{{ raise_exception('a' * 10 ** 6) }}", "render this conversation: a{1000}$"),
}
proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="requires /proc")


def sandbox_process_of(template: ChatTemplate) -> subprocess.Popen[bytes]:
    return template._renderer._locked.process._process


def process_exists(pid: int) -> bool:
    """Whether the process exists, possibly as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("source", "reason"), BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_a_one_line_error_and_the_next_rendering_works(source: str, reason: str) -> None:
    template = ChatTemplate("{% if messages[0].content == 'go' %}" + source + "{% endif %}well", limits=SHORT)
    start = time.process_time()
    with pytest.raises(InputError, match=reason) as caught:
        template.render([user_message("go")])
    assert time.process_time() - start < 0.3, "the parent process used no CPU time"
    assert "\n" not in str(caught.value)
    assert template.render([user_message("no")]) == "well"


@pytest.mark.parametrize(("source", "reason"), CONSTANT_BOMBS.values(), ids=CONSTANT_BOMBS)
def test_a_bomb_for_the_compiler_is_refused_on_loading(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        ChatTemplate(source, limits=SHORT)


@pytest.mark.parametrize("length", [9, 10**6])  # below and above the capacity of the pipe
def test_a_stopped_sandbox_is_ended_by_the_wall_clock_limit(length: int) -> None:
    template = ChatTemplate(PLAIN, limits=SandboxLimits(wall_seconds=0.3))
    sandbox_process_of(template).send_signal(signal.SIGSTOP)
    with pytest.raises(LimitError, match=r"took longer than 0\.3 s"):
        template.render([user_message("a" * length)])
    assert template.render(USER_TURN).startswith("user: ")


def test_a_crash_while_rendering_is_an_error_and_a_dead_sandbox_is_replaced() -> None:
    template = ChatTemplate("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}")
    child = sandbox_process_of(template)
    with ThreadPoolExecutor(1) as pool:
        rendering = pool.submit(template.render, USER_TURN)
        time.sleep(0.2)
        child.send_signal(signal.SIGSEGV)
        with pytest.raises(LimitError, match="ended its process with status -11"):
            rendering.result()
    template = ChatTemplate(PLAIN)
    sandbox_process_of(template).kill()
    sandbox_process_of(template).wait()
    assert template.render(USER_TURN).startswith("user: ")


def test_a_limit_error_is_not_treated_as_a_rejected_system_message() -> None:
    source = "{% if messages[0].role == 'system' %}{{ messages[0].role * 10 ** 10 }}{% endif %}well"
    with pytest.raises(LimitError, match="MiB of memory"):
        render_branches(ChatTemplate(source, limits=SHORT), PLAIN_TOKENIZER, USER_TURN, [])


@pytest.mark.parametrize(
    "text", ["\ud83d\ude00", "\ud83d", "a\nb\r\u2028\x00", "~=", "", "😀" * 9], ids=ascii
)
def test_every_text_survives_the_round_trip(text: str) -> None:
    source = "{{ messages[0].content }}{{ keys | list | first }}"
    rendered = ChatTemplate(source).render([user_message(text)], keys={text: 1})
    assert rendered == text + text
    assert (
        ChatTemplate(text + "{{ bos_token }}", text).render(USER_TURN) == text.replace("\r", "\n") + text
    ), "jinja2 normalizes line endings"


def test_too_deeply_nested_values_are_refused() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    template = ChatTemplate("{{ x }}")
    with pytest.raises(InputError, match="nested too deeply"):
        template.render(USER_TURN, x=deep)
    for _ in range(4600):
        deep = deep[0]
    assert template.render(USER_TURN, x=deep) == "[" * 401 + "]" * 401


def test_a_long_conversation_is_within_the_limits() -> None:
    text = "a b " * 10**6
    (base,) = render_branches(ChatTemplate(PLAIN), StubTokenizer(), [user_message(text)], [])  # type: ignore[arg-type]
    assert base.prompt.endswith(f"user: {text}\n")


class StubTokenizer:
    """The tokenizer methods that rendering needs; really encoding millions of characters is slow."""

    bos_token, prefix_token_ids = "", ()

    def find_added_token(self, text: str) -> None:
        return None

    def encode(self, text: str, untrusted: Any) -> list[int]:
        assert len(text) - 1 not in untrusted
        assert len(text) - 3 in untrusted
        return [1]

    def token_to_ids(self, text: str) -> list[int]:
        return [1]


def test_threads_share_one_sandbox_process() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    child = sandbox_process_of(template)
    texts = [f"{n} " * n for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: template.render([user_message(text)]), texts)) == texts
    assert sandbox_process_of(template) is child


def test_the_sandbox_ends_with_the_template_and_leaves_no_zombie() -> None:
    template = ChatTemplate(PLAIN)
    pid = sandbox_process_of(template).pid
    assert process_exists(pid)
    del template
    gc.collect()
    assert not process_exists(pid)


@proc
def test_an_invalid_template_leaves_no_process() -> None:
    before = _child_pids()
    for source in ("{% if %}", "{{ 7 ** (10 ** 9) }}"):
        with pytest.raises(InputError):
            ChatTemplate(source, limits=SHORT)
    gc.collect()
    assert _child_pids() <= before


def _child_pids() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


IN_A_PROCESS = """
import os, sys, threading
from trimtab.models.chat.template import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}")
child = lambda: template._renderer._locked.process._process.pid
"""


def run_program(program: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_A_PROCESS + program],
        capture_output=True, text=True, timeout=120, check=False, **more,
    )  # fmt: skip


def test_the_sandbox_ends_with_its_parent_process() -> None:
    for end, status in (("", 0), ("sys.exit(3)", 3), ("os._exit(4)", 4), ("os.kill(os.getpid(), 9)", -9)):
        done = run_program(f"print(child(), flush=True)\n{end}")
        assert (done.returncode, done.stderr) == (status, "")
        wait_until(lambda pid=int(done.stdout): not process_exists(pid))


def test_a_forked_process_renders_in_its_own_sandbox() -> None:
    done = run_program("""
render = lambda text: template.render([{"content": text}])
parent_child, lock = child(), template._renderer._locked.lock
lock.acquire()  # as if another thread were rendering
if (pid := os.fork()) == 0:
    assert render("fork") == "fork" and child() != parent_child
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
lock.release()
assert render("parent") == "parent" and child() == parent_child
""")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_rendering_works_without_standard_streams(closed: str, tmp_path: Path) -> None:
    program = IN_A_PROCESS + "open(sys.argv[1], 'w').write(template.render([{'content': 'said'}]))"
    command = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", program, str(tmp_path / "text")]
    assert subprocess.run(command, check=False, timeout=120).returncode == 0
    assert (tmp_path / "text").read_text() == "said"


def test_an_interrupt_leaves_no_stale_reply_for_the_next_rendering() -> None:
    done = run_program("""
import signal
loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
loops = "{% if messages[0].content == 'go' %}" + loops + "{% endif %}"
template = ChatTemplate(loops + "{{ messages[0].content }}")
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    template.render([{"content": "go"}])
except KeyboardInterrupt:
    print(template.render([{"content": "next"}]))
""")
    assert (done.stdout, done.stderr) == ("next\n", "")


def test_an_interrupt_at_the_time_limit_leaves_no_stale_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts before the child is killed, and before it is waited for."""
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if messages[0].content == 'go' %}" + loops + "{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(source, limits=SandboxLimits(wall_seconds=0.3))

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    for method in ("kill", "wait"):
        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                template.render([user_message("go")])
        time.sleep(1.5)
        assert template.render([user_message("next")]) == "next"


def test_the_sandbox_imports_neither_torch_nor_this_package() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SANDBOX_SCRIPT), "1", str(1 << 28)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "jinja2" in imported
    assert not {"torch", "numpy", "trimtab"} & imported


@proc
def test_the_sandbox_has_only_the_passed_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", "hush")
    monkeypatch.setenv("TZ", "UTC")
    template = ChatTemplate(PLAIN)
    proc_dir = Path("/proc", str(sandbox_process_of(template).pid))
    environ = dict(entry.split("=", 1) for entry in (proc_dir / "environ").read_text().split("\0")[:-1])
    assert environ["TZ"] == "UTC"
    assert environ.keys() <= set(PASSED_ENV_VARS)
    limits = (proc_dir / "limits").read_text()
    assert "hush" not in (proc_dir / "cmdline").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if "open files" in line] == [["0", "0"]]
    assert len(list((proc_dir / "fd").iterdir())) == 3


def test_a_sandbox_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(RunError, match="chat templates"):
            SandboxRenderer(PLAIN)


@pytest.mark.parametrize(
    "source",
    ["{{ messages | pprint }}", "{{ 'a b' | wordwrap(1) }}", "{{ lipsum(1) }}", "{{ '\\N{EN DASH}' }}"],
)
def test_lazy_imports_of_jinja_work_in_the_sandbox(source: str) -> None:
    assert ChatTemplate(source).render(USER_TURN)


@pytest.mark.parametrize("reply", ["[1]", "no JSON", "\ud800", "[" * 100_000, "", "{}{}"], ids=range(6))
def test_a_compromised_sandbox_cannot_inject_a_result(
    reply: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    say = "sys.stdout.buffer.write(reply.encode('utf-8', 'surrogatepass') + b'\\n'); sys.stdout.flush()"
    program.write_text(f"import sys\nfor reply in ('{{}}', '{{}}', {reply!r}):\n    {say}\n    input()\n")
    monkeypatch.setattr("trimtab.models.chat.sandbox_process.SANDBOX_SCRIPT", program)
    with pytest.raises(LimitError, match="ended its process"):
        SandboxRenderer(PLAIN).render({})
