"""Starts the runs of a certificate under a real launcher, watches how far they get, and kills all their processes."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import ARCHITECTURES, DEFAULT_ARCHITECTURE
from engine.errors import HANG_EXIT_CODE, RunError
from engine.train.audit import Entry, entries
from launch.certify.plan import GLOBAL_BATCH, SAVE_INTERVAL, STEPS, Plan, kill_after

log = logging.getLogger(__name__)

SCRIPT = str(Path(__file__).parent.with_name("train.py"))
#: in the environment of every process of a start, to find them all by, orphans too
MARK = "ZEROBERT_CERTIFY"
#: where a loader that is killed leaves a batch that torch was about to unlink
SHARED_MEMORY = Path("/dev/shm")
#: seconds that a start may take
PATIENCE = 900.0
#: how often a start that hung before its first step, and ended itself by its exit code for that, is made again
MOST_HANGS = 2
#: seconds between looks at the audit
INTERVAL = 0.01
#: a kill comes up to this many steps after the chosen one, so that it meets every part of a step and of a save
JITTER = 2.0
MODEL = [
    "--model.hidden_size=32",
    "--model.heads=2",
    "--model.layers=2",
    "--model.max_positions=64",
    "--data.sequence_length=64",
]
#: of ModernBERT, so that a layer sees a part of a sequence alone
WINDOW = ["--model.window=16"]
#: of runs with adapters, which learn from labelled paragraphs
FINE_TUNING = [
    "--task=sequence_classification",
    "--labelled.text=text",
    "--labelled.label=part",
    "--labelled.max_length=48",
]
RUN = [
    "--resume=auto",
    "--data.workers=1",
    "--optim.learning_rate=1e-3",
    f"--train.steps={STEPS}",
    f"--train.global_batch={GLOBAL_BATCH}",
    f"--train.save_interval={SAVE_INTERVAL}",
    "--train.async_save=true",
    "--train.audit=true",
    "--train.log_interval=1",
    "--train.threads=1",
    "--fault.max_stalled_restarts=null",
    "--fault.hang_timeout=120",
    "--fault.slow_rank_factor=null",
]
NO_DROPOUT = ["--model.hidden_dropout=0", "--model.attention_dropout=0"]
#: what a launcher around the certificate left in the environment
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "TORCHELASTIC_", "CROSS_", "SLURM_", "OMPI_", "PMI_")


@dataclass(frozen=True)
class RunSetup:
    """Where and how a certificate's runs are made."""

    output: Path
    launcher: str
    """torchrun or deepspeed"""
    seed: int
    architecture: str = DEFAULT_ARCHITECTURE
    adapter: str = "none"
    """the method by which runs fine-tune `base`; none trains all weights, on raw text"""

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def labelled(self) -> Path:
        """The examples of runs with adapters."""
        return self.output / "text" / "labelled.jsonl"

    @property
    def base(self) -> Path:
        """The run whose model is adapted."""
        return self.output / "runs" / "base"

    def run_folder(self, plan: Plan) -> Path:
        return self.output / "runs" / plan.name

    def log(self, plan: Plan, start: int) -> Path:
        """What a start of the run printed; they count from 1."""
        return self.output / "logs" / f"{plan.name}-start-{start}.log"


@dataclass(frozen=True)
class Start:
    """How a start of a run ended."""

    ranks: int
    identity: str | None
    """its name in the audit; None if it did no step"""
    killed: int | None
    """the last step before it was killed; None if it came to its end"""
    seconds: float
    saving: bool = False
    """killed in the middle of a save"""
    failure: str | None = None
    """why it came to no good end by itself"""
    hung: int = 0
    """tries before it that hung before their first step; their exit code asks for another start"""


class HungError(RunError):
    """A start hung before its first step, and ended itself."""


def options(plan: Plan, setup: RunSetup) -> list[str]:
    """The training options of a run, the same for all of its starts."""
    learned = pretraining(setup) if setup.adapter == "none" else adapting(setup)
    fixed = [f"--output={setup.run_folder(plan)}", f"--seed={setup.seed}", *learned]
    return [*fixed, *RUN, f"--train.zero_stage={plan.stage}", *([] if plan.dropout else NO_DROPOUT)]


def pretraining(setup: RunSetup) -> list[str]:
    """The options of data and model of a run on raw text."""
    few = "--train.eval_samples=16"
    return [f"--data.path={setup.data}", *architecture_options(setup.architecture), *MODEL, few]


def adapting(setup: RunSetup) -> list[str]:
    """The options of data, model and method of a run with adapters."""
    base = f"--model.init_from={setup.base / 'export'}"
    return [*FINE_TUNING, f"--labelled.train={setup.labelled}", base, f"--adapter.method={setup.adapter}"]


def make_base(setup: RunSetup) -> None:
    """Pre-train the model that adapters are put on, for a step.

    Raises:
        RunError: it failed.
    """
    chosen = [f"--output={setup.base}", f"--seed={setup.seed}", "--train.steps=1", "--train.threads=1"]
    log = setup.output / "logs" / "base.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        begin = [sys.executable, SCRIPT, *pretraining(setup), *chosen]
        code = subprocess.run(begin, stdout=file, stderr=file, env=environment(secrets.token_hex()), check=False)
    if code.returncode:
        raise RunError(f"the run that makes a base for adapters failed{last_word(log)}")


def architecture_options(name: str) -> list[str]:
    """The options that an architecture's runs have beside all others': MLM alone where it has no head for pairs."""
    architecture = ARCHITECTURES.get(name)
    alone = [] if "pretraining" in architecture.export_classes else ["--data.objective=mlm"]
    return [f"--model.architecture={name}", *alone, *(WINDOW if "window" in architecture.options else [])]


def command(launcher: str, ranks: int) -> list[str]:
    """The command line of a launcher, up to the script."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    from launch.launcher import free_port

    binary = str(Path(sys.executable).parent / "deepspeed")
    return [sys.executable, binary, "--quiet", "--num_accelerators", str(ranks), "--master_port", str(free_port())]


def environment(mark: str) -> dict[str, str]:
    """This environment without an outer launcher's variables, for CPU ranks of one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {"DS_ACCELERATOR": "cpu", **kept, "OMP_NUM_THREADS": "1", MARK: mark}


def carry_out(plan: Plan, setup: RunSetup, moments: random.Random) -> list[Start]:
    """Start a run, kill it and start it again as planned, until it is done or fails; how its starts ended."""
    done: list[Start] = []
    for index, ranks in enumerate(plan.ranks):
        kills_left = plan.kills - index
        target = kill_after(moments, newest(setup.run_folder(plan)), kills_left) if kills_left else None
        start = persistent_start(plan, setup, ranks, target, moments, index + 1)
        done.append(start)
        end = start.failure or ("done" if start.killed is None else f"killed after step {start.killed}")
        log.info(f"{plan.name}: start {index + 1} of {len(plan.ranks)}, {ranks} rank(s): {end}, {start.seconds:.1f} s")
        if start.killed is None:
            break
    return done


def persistent_start(
    plan: Plan, setup: RunSetup, ranks: int, target: int | None, moments: random.Random, number: int
) -> Start:
    """`one_start`, made again where it hangs before its first step; a failure is part of the answer."""
    for hung in range(MOST_HANGS + 1):
        try:
            return replace(one_start(plan, setup, ranks, target, moments, number), hung=hung)
        except HungError as error:
            problem: RunError = error
            log.info(str(error))
        except RunError as error:
            problem = error
            break
    return Start(ranks, None, None, 0.0, failure=str(problem), hung=hung)


def newest(folder: Path) -> int:
    """The step of a run's newest checkpoint, 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*")), default=0)


def one_start(
    plan: Plan, setup: RunSetup, ranks: int, target: int | None, moments: random.Random, number: int
) -> Start:
    """Start a run and, with a target, kill all its processes at a random moment of the steps that follow that step.

    Raises:
        RunError: it failed by itself, or takes too long.
    """
    folder, log = setup.run_folder(plan), setup.log(plan, number)
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    watch = Watch(folder / "audit" / "rank-00000.jsonl")
    arguments = [*command(setup.launcher, ranks), SCRIPT, *options(plan, setup)]
    with log.open("wb") as printed, started(arguments, printed.fileno()) as (process, mark):
        while process.poll() is None:
            entry = watch.look()
            if target is not None and entry is not None and entry.step >= target:
                time.sleep(moments.uniform(0, JITTER * watch.pace))
                if process.poll() is not None:
                    break
                kill_all(mark)
                entry = watch.look()
                assert entry is not None
                saving = any((folder / "checkpoints").glob(".partial-step-*"))
                return Start(ranks, entry.start, entry.step, time.monotonic() - begin, saving)
            if time.monotonic() - begin > PATIENCE:
                raise RunError(f"{plan.name}: start {number} is not done after {PATIENCE:.0f} s; see {log}")
            time.sleep(INTERVAL)
    entry = watch.look()
    if process.returncode:
        kind = HungError if hang_ended(log) and entry is None else RunError
        raise kind(f"{plan.name}: start {number} ended with exit code {process.returncode}{last_word(log)}")
    return Start(ranks, entry.start if entry else None, None, time.monotonic() - begin)


def hang_ended(log: Path) -> bool:
    """Whether a rank's watchdog ended a start, which asks for another one; torchrun has an exit code of its own."""
    return f"exit code {HANG_EXIT_CODE}\n" in log.read_text(errors="replace")


def last_word(log: Path) -> str:
    """What a failed start said, for the end of a sentence."""
    lines = log.read_text(errors="replace").splitlines()
    said = (line for line in lines if re.match(r"error: |[\w.]+(Error|Exception): ", line))
    error = next(said, lines[-1] if lines else "nothing was printed")
    return f" ({error.removeprefix('error: ')}); see {log}"


class Watch:
    """Follows what rank 0 of a start notes in its audit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() else 0
        self._entry: Entry | None = None
        self._first: tuple[float, int] | None = None
        self.pace = 0.0
        """seconds a step so far"""

    def look(self) -> Entry | None:
        """The entry of the last step, None before the first one."""
        if not self._path.is_file() or self._path.stat().st_size <= self._offset:
            return self._entry
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for entry in entries(whole.decode(errors="replace")):
            self._entry = entry
            self._first = self._first or (time.monotonic(), entry.step)
            if entry.step > self._first[1]:
                self.pace = (time.monotonic() - self._first[0]) / (entry.step - self._first[1])
        return self._entry


@contextlib.contextmanager
def started(arguments: list[str], output: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Processes of a launcher and their mark; none of them is left at the end."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        arguments, env=environment(mark), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process, mark
    finally:
        kill_all(mark)
        process.wait()


def marked(mark: str) -> list[int]:
    """The living processes that a start has left in the process table."""
    sought, processes = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and sought in (folder / "environ").read_bytes().split(b"\0"):
                processes.append(int(folder.name))
    return processes


def kill_all(mark: str) -> None:
    """Kill -9 launcher, ranks and loaders at once, wait until none of them is left, and free their shared memory.

    Raises:
        RunError: one can't be killed.
    """
    deadline, killed = time.monotonic() + 60, set[int]()
    while processes := marked(mark):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed.update(processes)
        if time.monotonic() > deadline:
            raise RunError(f"processes {processes} outlive SIGKILL; is their file system hung?")
        time.sleep(INTERVAL)
    for file in (file for process in killed for file in SHARED_MEMORY.glob(f"torch_{process}_*")):
        file.unlink(missing_ok=True)
