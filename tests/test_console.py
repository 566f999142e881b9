"""No command depends on who reads what it prints."""

import io
import os
import subprocess
import sys

import pytest

from sdtrain.console import UnbreakableStream, secure_streams

COMMANDS = ("train", "sample", "evaluate", "schedule", "report")


def nobody_reads() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("target", [nobody_reads, full_disk])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_breaks_is_left_out(target, name, capfd):
    with open(target(), "w") as stream:
        unbreakable = UnbreakableStream(stream, name)
        for _ in range(2):
            print("x", file=unbreakable, flush=True)
    said = capfd.readouterr().err
    assert said.count("stdout cannot be written") == (name == "stdout")


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("latin-1", rb"\u661f \xe9".replace(rb"\xe9", b"\xe9")),
        ("ascii", rb"\u661f \xe9"),
        ("utf-8", "\u661f é".encode()),
    ],
)
def test_letters_that_an_encoding_lacks_are_escaped(encoding, written):
    file = io.BytesIO()
    unbreakable = UnbreakableStream(io.TextIOWrapper(file, encoding), "stdout")
    print("\u661f é", file=unbreakable, flush=True)
    unbreakable.writelines(["\udce9"])
    unbreakable.flush()
    assert file.getvalue() == written + b"\n\\udce9"


def test_a_second_command_in_one_process_finds_its_streams_secured(monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.StringIO())
    secure_streams()
    first = sys.stdout
    secure_streams()
    assert sys.stdout is first


CLOSED = """
import os, subprocess, sys
from sdtrain.console import secure_streams
if len(sys.argv) > 1:
    secure_streams()
file = open(os.devnull)
print("lost")
print("lost", file=sys.stderr)
print(min(file.fileno(), subprocess.run(["sh", "-c", "echo lost"]).returncode or 3), file=answer)
"""


@pytest.mark.parametrize("secured", [True, False])
def test_a_closed_stream_is_nobody_else_s(tmp_path, secured):
    """Neither the next file's, nor missing in a child process. And the twin."""
    script = tmp_path / "closed.py"
    script.write_text(CLOSED.replace("file=answer", f"file=open({str(tmp_path / 'a')!r}, 'w')"))
    words = [sys.executable, str(script), *(["secured"] if secured else [])]
    code = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]).returncode
    answer = (tmp_path / "a").read_text() if (tmp_path / "a").exists() else ""
    assert (code == 0 and answer == "3\n") == secured


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_leaves_as_if_it_were_read(name):
    command = f"{sys.executable} -m sdtrain.commands.{name}"
    for words, code in (
        ("--help >&- 2>&- <&-", 0),
        ("--help >/dev/full", 0),
        ("--help | head -c 1", 0),
        ("no_such_key=1 >/dev/full 2>/dev/full", 2),
    ):
        line = f"set -o pipefail; {command} {words}"
        ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert ended.returncode == code, (words, ended.stderr)
        assert "Traceback" not in ended.stderr
