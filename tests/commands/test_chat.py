"""`nibble chat`: lines piped in, and a real pseudo-terminal."""

import io
import os
import select
import signal
import sys
import time
from contextlib import suppress

import pytest

from nibble.commands.main import main


@pytest.fixture
def call(capsys, monkeypatch, tiny_model_folder):
    """Exit code, output and messages of a chat with these lines piped in."""

    def run(lines, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as stop:
            main(["chat", "--model", str(tiny_model_folder("llama")), *words])
        return stop.value.code, *capsys.readouterr()

    return run


def test_every_line_that_is_piped_in_is_answered_without_escape_codes(call):
    code, out, err = call("hi\n\nthere\n/stats\n", "--max-new-tokens", "3")
    assert code == 0, err
    assert "\x1b" not in out + err
    assert "tokens/s" in err
    assert out.endswith("\n")


def test_a_wrong_line_that_is_piped_in_ends_with_its_code(call):
    code, _, err = call("/hlp\n")
    assert (code, 'did you mean "/help"' in err) == (2, True)


def test_two_slashes_say_a_text(call):
    assert call("//hlp\n/quit\nnever\n", "--max-new-tokens", "1")[0] == 0


def test_wrong_options(call):
    assert call("", "--compare")[0] == 2
    assert call("", "--method", "full")[0] == 2
    assert call("", "--temperature", "-1")[0] == 2
    assert call("", "--adapter", "none")[0] in (65, 74)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_terminal(tiny_model_folder, tmp_path):
    import pty

    environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path)}
    words = ["-m", "nibble", "chat", "--model", str(tiny_model_folder("llama"))]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, *words, "--max-new-tokens", "100"], environment)
    try:
        _wait_for(terminal, b"> ")
        os.write(terminal, b"\x1b[200~one\ntwo\x1b[201~\r")
        assert b"\x1b[?25l" in _wait_for(terminal, b"> ", skip=b"\x1b[?25h")
        os.write(terminal, b"/set max_new_tokens 200\r")
        _wait_for(terminal, b"> ", skip=b"max_new_tokens 200\x1b")
        os.write(terminal, b"three\r")
        _wait_for(terminal, b"\x1b[?25l")
        os.write(terminal, b"\x03")
        _wait_for(terminal, b"> ", skip=b"stopped")
        os.write(terminal, b"/hlp\r")
        assert b"/help" in _wait_for(terminal, b"> ", skip=b"did you mean")
        status = _interrupt_until_it_ends(terminal, pid)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    kept = (tmp_path / "nibble" / "chat_history").read_text().splitlines()
    assert kept == ["one", "two", "/set max_new_tokens 200", "three", "/hlp"]


def _interrupt_until_it_ends(terminal, pid):
    """Ctrl-C at the prompt; one that comes before readline waits is seen at the next key alone."""
    for _ in range(60):
        with suppress(OSError):
            os.write(terminal, b"\x03")
        time.sleep(0.5)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _wait_for(terminal, mark, *, skip=b"", seconds=120):
    """What the terminal got until `mark` stands after `skip`."""
    seen, end = b"", time.monotonic() + seconds
    while mark not in seen[seen.find(skip) :] or skip not in seen:
        assert time.monotonic() < end, seen[-500:]
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)
    return seen
