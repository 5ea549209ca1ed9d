"""Every family of kernels against plain torch, each in a process of its own, and the tests that need a GPU.

`python -m benchmarks.proof.kernels FAMILY DEVICE` is one family's process: an illegal access would end what CUDA does
in it for good, and so must take no other family along. compute-sanitizer runs the same.
"""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.all import last_line
from benchmarks.common import ROOT, goal
from benchmarks.proof.runs import run_commands
from benchmarks.proof.stage import Report, Setting

AGREES = "agrees"
#: families that every back end has in all precisions
EVERYWHERE = ("loss", "norm", "adamw", "lamb")
AT_ONCE = 4
#: seconds of a family, its compilation included
LONGEST = 120.0


def family(name: str, device_name: str) -> str:
    """What is wrong with a family on a device, in a line, or that nothing is."""
    import torch

    from engine.kernels import cpu, cuda
    from engine.kernels.cuda.selfcheck import disagreement

    module = cuda if device_name == "cuda" else cpu
    if not module.available():
        return f"the kernels of {device_name} can't be built here"
    device = torch.device("cuda", torch.cuda.current_device()) if device_name == "cuda" else torch.device("cpu")
    return disagreement(module, device, name) or AGREES


def families(device: str) -> list[str]:
    """The names of all; on a CPU of those that every back end has, for the others take what its kernels don't."""
    from engine.kernels.cuda.selfcheck import FAMILIES

    return [name for name in FAMILIES if device == "cuda" or name in EVERYWHERE]


def command(name: str, device: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.proof.kernels", name, device]


def check_families(setting: Setting, report: Report) -> None:
    """A row of all families."""
    commands = {name: command(name, setting.device) for name in families(setting.device)}
    rivals: dict[str, dict[str, Any]] = {}
    for name, ended in run_commands(commands, Path(setting.scratch), setting.device, AT_ONCE, LONGEST):
        last = last_line(ended.printed)
        found = last.removeprefix("result: ") if ended.code == 0 else f"exit code {ended.code}: {last}"
        rivals[name] = {"result": found, "seconds": ended.seconds}
        wrong = sum(values["result"] != AGREES for values in rivals.values())
        held = goal(f"of {len(rivals)} families not as plain torch", float(wrong), at_most=0)
        report.put({"title": "kernel families against plain torch", "rivals": rivals, "goals": [held]})
        if rivals[name]["result"] != AGREES:
            print(f"--- {name}\n{ended.printed[-3000:]}", flush=True)


def tests() -> dict[str, list[str]]:
    """What pytest is given for each file that has tests that need a GPU."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_cuda*.py"))
    found = {path.name: [str(path.relative_to(ROOT))] for path in files}
    found["test_waits.py"] = ["tests/train/test_waits.py", "-k", "cuda"]
    found["test_loader.py"] = ["tests/data/loading/test_loader.py", "-k", "pinned"]
    return found


def counted(printed: str) -> dict[str, float]:
    """Tests by how they ended, from pytest's last line."""
    words = ("passed", "failed", "skipped", "error")
    return {word: float(found[1]) for word in words if (found := re.search(rf"(\d+) {word}", last_line(printed)))}


def run_tests(setting: Setting, report: Report) -> None:
    """A row of the tests, by file."""
    title = "tests that need a GPU"
    if setting.device == "cpu":
        return report.put({"title": title, "rivals": {"pytest": {"result": "skipped: there is no GPU here"}}})
    if find_spec("pytest") is None:
        return report.put({"title": title, "rivals": {"pytest": {"result": "skipped: pytest is not installed"}}})
    rivals: dict[str, dict[str, Any]] = {}
    base = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    commands = {name: [*base, *arguments] for name, arguments in tests().items()}
    for name, ended in run_commands(commands, Path(setting.scratch), setting.device, AT_ONCE, LONGEST):
        rivals[name] = {**counted(ended.printed), "exit code": float(ended.code), "seconds": ended.seconds}
        print(f"--- {name}\n{ended.printed[-3000:]}", flush=True)
        failures = re.findall(r"^(?:FAILED|ERROR) .*", ended.printed, re.MULTILINE)
        if failures:
            rivals[name]["failures"] = "; ".join(failures)[:2000]
        bad = sum(values["exit code"] != 0 for values in rivals.values())
        held = goal(f"of {len(rivals)} files of tests that failed", float(bad), at_most=0)
        report.put({"title": title, "rivals": rivals, "goals": [held]})
    return None


def run(setting: Setting, report: Report) -> None:
    check_families(setting, report)
    run_tests(setting, report)


if __name__ == "__main__":
    print(f"result: {family(*sys.argv[1:])}", flush=True)
