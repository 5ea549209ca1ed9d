"""Programs and ports that stand for what the doctor asks."""

from __future__ import annotations

import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.doctor.finding import Finding

#: a remote shell to a node whose clock is ahead, and whose python is this one's with another torch
FAKE_SSH = """#!{python}
import subprocess, sys, time
if "date" in sys.argv:
    print(f"{{time.time() + {ahead}:.9f}}")
else:
    done = subprocess.run([sys.executable, "-"], stdin=sys.stdin, capture_output=True, text=True)
    print(done.stdout.replace('"torch": "', '"torch": "{prefix}'), end="")
"""


def program(folder: Path, name: str, text: str) -> Path:
    """An executable file in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake(folder: Path, name: str, ahead: float = 0.0, prefix: str = "") -> None:
    """A remote shell; its node's clock is `ahead` seconds, and its torch's version begins with `prefix`."""
    program(folder, name, FAKE_SSH.format(python=sys.executable, ahead=ahead, prefix=prefix))


@contextmanager
def listening_port() -> Iterator[int]:
    """A port of this machine that accepts connections, as sshd's would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding
