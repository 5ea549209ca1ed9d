"""Kill -9 all ranks of real runs at random moments, and prove that their resumes lose and repeat nothing.

  zerobert certify --output /scratch/certificate
  zerobert certify --output /scratch/certificate --kills 4 --stages 2 --routes 1-2-1
  zerobert certify --output /scratch/certificate --adapter lora

Each run goes along a route of numbers of ranks, such as 1-2-4-2-1: it is killed in the middle of training, often in the
middle of a save, and goes on in the next layout with --resume auto, until it is done. Then

- the loss of every step is compared with that of a run which was never disturbed: bit for bit where the number of
  ranks stays (dropout on, and the final weights too), within 1e-4 elsewhere (dropout off: its generators belong to
  ranks);
- the samples of every step, by hashes of the token ids that went into the model, are compared with the stream of
  samples as made here, one by one: none is seen twice, none is missed.

Run it in a folder of the file system that your checkpoints go to. It needs no GPU: the ranks are CPU processes.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from engine.config import ARCHITECTURES, DEFAULT_ARCHITECTURE
from engine.config.methods.adapter import READ
from engine.errors import RunError, UserError
from launch.certify import plan as planning
from launch.certify.plan import GLOBAL_BATCH, STEPS, Plan
from launch.cli import CommandParser

if TYPE_CHECKING:
    from launch.certify.report import Row
    from launch.certify.runs import RunSetup
    from launch.certify.verdict import Sample

log = logging.getLogger(__name__)

#: the certificate as a file, in its folder; by it a folder is known again as one that may be replaced
RESULT = "certificate.json"
MOST_KILLS = 1000
PARTS = ("runs", "logs", "text", "data")


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert certify", description=__doc__)
    parser.add_argument("--output", type=str, default="runs/certificate", help="folder of all that it writes; kept")
    parser.add_argument("--kills", type=int, default=20, help="how often runs are killed")
    parser.add_argument("--stages", type=str, default="1,2,3", help="ZeRO stages")
    parser.add_argument("--routes", type=str, default="1-2-4-2-1,2-2", help="ranks of a run before and after each kill")
    parser.add_argument("--seed", type=int | None, default=None, help="of the moments and the runs; null draws one")
    architectures = Literal.__getitem__(ARCHITECTURES.names)
    parser.add_argument("--architecture", type=architectures, default=DEFAULT_ARCHITECTURE, help="of the model")
    methods = Literal.__getitem__(tuple(READ))
    parser.add_argument("--adapter", type=methods, default="none", help="fine-tune by these adapters, not pre-train")
    launchers = Literal["torchrun", "deepspeed"]
    parser.add_argument("--launcher", type=launchers, default="torchrun", help="what starts the ranks")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and progress on stderr")
    return parser


def main(arguments: list[str]) -> int:
    """Make the certificate; exit code 1 if it is refused."""
    values = build_parser().parse_args(arguments)
    stages, routes = planning.parse_stages(values.stages), planning.parse_routes(values.routes)
    if not 1 <= values.kills <= MOST_KILLS:
        raise UserError(f"kills: {values.kills} is not allowed; give 1 to {MOST_KILLS}")
    seed = secrets.randbelow(2**31) if values.seed is None else values.seed
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: {seed} is not allowed; give a whole number in [0, 2^32)")
    plans = planning.plan_runs(stages, routes, values.kills)
    output = empty_folder(Path(values.output))
    begin = time.monotonic()
    show_progress(sys.stderr if values.json else sys.stdout)
    from launch.certify.report import as_json, last_lines, summary, table
    from launch.certify.runs import RunSetup

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the blocks that end the ranks
    rows = certify(plans, RunSetup(output, values.launcher, seed, values.architecture, values.adapter))
    changes = [pair for route in routes for pair in pairwise(route)]
    wanted = {f"ZeRO-{stage} {before} -> {after}" for stage in stages for before, after in changes}
    result = {
        **summary(rows, wanted),
        "architecture": values.architecture,
        "adapter": values.adapter,
        "seed": seed,
        "seconds": round(time.monotonic() - begin),
    }
    document = json.dumps(as_json(rows, result), indent=1)
    (output / RESULT).write_text(document + "\n")
    print(document if values.json else f"\n{table(rows)}\n\n{last_lines(rows, result)}")
    return 0 if result["certified"] else 1


class Stopwatch(logging.Formatter):
    """Puts the seconds since it was made before each line."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        """The line of a message."""
        return f"[{time.monotonic() - self._begin:4.0f} s] {record.getMessage()}"


def show_progress(stream: TextIO) -> None:
    """Print what this package logs to a stream."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Stopwatch())
    package = logging.getLogger(__package__)
    package.addHandler(handler)
    package.setLevel(logging.INFO)


def empty_folder(output: Path) -> Path:
    """The empty folder of a certificate; what an earlier one left there is removed.

    Raises:
        UserError: it can't be made, or holds other files.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()) and not (output / RESULT).is_file():
            raise UserError(f"output: {str(output)!r} holds other files; give a new folder")
        for part in PARTS:
            shutil.rmtree(output / part, ignore_errors=True)
        (output / RESULT).write_text("{}\n")
    except OSError as error:
        raise UserError(f"output: {str(output)!r}: {error.strerror}; give a folder that can be written") from error
    return output.resolve()


def certify(plans: Sequence[Plan], setup: RunSetup) -> list[Row]:
    """Carry out the plans and those that they are compared with; a row a start."""
    from launch.certify.data import prepare_labelled, prepare_text, stream
    from launch.certify.runs import make_base, options

    output, seed, adapter = setup.output, setup.seed, setup.adapter
    kills, starts = sum(plan.kills for plan in plans), sum(len(plan.ranks) for plan in plans)
    references = list(dict.fromkeys(plan.reference for plan in plans))
    starts += len(references)
    trained = setup.architecture if adapter == "none" else f"{adapter} on {setup.architecture}"
    log.info(f"{kills} kills in {len(plans)} runs of {trained}, {starts} starts in all, in {output}; seed {seed}")
    prepare_text(output / "text", setup.data, seed)
    if adapter != "none":
        prepare_labelled(setup.labelled)
        make_base(setup)
    samples = stream(options(plans[0], setup), STEPS, GLOBAL_BATCH)
    epochs = samples[-1][-1].epoch + 1
    log.info(f"{STEPS} steps of {GLOBAL_BATCH} samples, over {epochs} epochs of a part of the embedded corpus")
    rows: list[Row] = []
    for plan in [*references, *plans]:
        moments = random.Random(f"{seed} {plan.name}")
        rows += examine(plan, setup, moments, samples)
    return rows


def examine(plan: Plan, setup: RunSetup, moments: random.Random, samples: Sequence[Sequence[Sample]]) -> list[Row]:
    """Carry out one plan and judge it.

    Raises:
        RunError: a run that was to be undisturbed failed.
    """
    from engine.train.audit import read_audit
    from launch.certify.report import failed_rows, rows_of
    from launch.certify.runs import carry_out
    from launch.certify.verdict import BOUND, judge
    from launch.curves import read_curves

    starts = carry_out(plan, setup, moments)
    if starts[-1].failure is not None:
        if plan.kills == 0:
            raise RunError(f"the undisturbed run failed: {starts[-1].failure}")
        return failed_rows(plan, starts)
    folder, reference = setup.run_folder(plan), setup.run_folder(plan.reference)
    ledger = read_audit(folder)
    curves = [read_curves(run, ["train/loss"])["train/loss"] for run in (folder, reference)]
    accounts = judge(ledger, samples, curves[0], curves[1], GLOBAL_BATCH, 0.0 if plan.dropout else BOUND)
    if plan.dropout and weights_of(folder) != weights_of(reference):
        accounts[None].problems.append("the final weights are not those of the undisturbed run, bit for bit")
    return rows_of(plan, starts, ledger.resumed, accounts)


def weights_of(run: Path) -> str:
    """The hash of a run's final weights, those of adapters where it has them."""
    from engine.durable import sha256_of

    (weights,) = (run / "export").glob("*.safetensors")
    return sha256_of(weights)
