"""The certificate's rows, its summary and its table. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.certify.plan import GLOBAL_BATCH, STEPS, Plan, least_resumed
from launch.certify.runs import Start
from launch.certify.verdict import BOUND, Account

#: problems of a start that are listed below the table
SHOWN_PROBLEMS = 4


@dataclass
class Row:
    """A start of a run, and the kill before it."""

    run: str
    stage: int
    dropout: bool
    ranks: int
    resumed: int
    """step that it went on from; 0: from the beginning"""
    before: int | None = None
    """ranks that were killed; None if nothing was"""
    killed: int | None = None
    """the last step that they did"""
    seconds: float | None = None
    """that they lived for"""
    saving: bool = False
    """they were killed in the middle of a save"""
    steps: int = 0
    """that this start did and that count: no later start did them again"""
    hung: int = 0
    """tries before this start that hung before their first step and ended themselves"""
    difference: float = 0.0
    """largest one of a loss, relative"""
    twice: int = 0
    """samples that were seen before"""
    missed: int = 0
    """samples that were never seen"""
    problems: list[str] = field(default_factory=list)

    @property
    def transition(self) -> str:
        change = f"{self.ranks}" if self.before is None else f"{self.before} -> {self.ranks}"
        return f"ZeRO-{self.stage} {change}"

    @property
    def name(self) -> str:
        return f"{self.transition} ({self.run})"


def rows_of(
    plan: Plan, starts: Sequence[Start], resumed: Mapping[str, int], accounts: Mapping[str | None, Account]
) -> list[Row]:
    """A row for each start of a run.

    Args:
        plan: of the run.
        starts: how they ended.
        resumed: for each that did a step, where it went on from.
        accounts: of the verdict; that of None goes to the last start.
    """
    rows = []
    for index, start in enumerate(starts):
        known = start.identity in resumed
        row = Row(plan.name, plan.stage, plan.dropout, start.ranks, resumed[start.identity or ""] if known else STEPS)
        row.hung = start.hung
        own = [accounts[start.identity]] if known else []
        if index + 1 == len(starts):
            own.append(accounts[None])
        row.steps = sum(len(account.steps) for account in own)
        row.difference = max((account.difference for account in own), default=0.0)
        row.twice, row.missed = sum(one.twice for one in own), sum(one.missed for one in own)
        row.problems = [problem for account in own for problem in account.problems]
        if index:
            add_kill(row, starts[index - 1])
        rows.append(row)
    return rows


def add_kill(row: Row, before: Start) -> None:
    """Note the kill before a start, and a loss of more than the save under way."""
    row.before, row.killed, row.seconds, row.saving = before.ranks, before.killed, before.seconds, before.saving
    if before.killed is not None and row.resumed < least_resumed(before.killed):
        row.problems.append(f"killed after step {before.killed}, it went on from step {row.resumed}: saves were lost")


def failed_rows(plan: Plan, starts: Sequence[Start]) -> list[Row]:
    """The row of a run of which a start failed."""
    row = Row(plan.name, plan.stage, plan.dropout, starts[-1].ranks, 0, problems=[str(starts[-1].failure)])
    if len(starts) > 1:
        before = starts[-2]
        row.before, row.killed, row.seconds, row.saving = before.ranks, before.killed, before.seconds, before.saving
    return [row]


def summary(rows: Sequence[Row], wanted: Set[str]) -> dict[str, Any]:
    """The certificate in numbers.

    Args:
        rows: of all runs.
        wanted: the changes of layout that were asked for, see `Row.transition`.
    """
    kills = [row for row in rows if row.killed is not None]
    problems = [f"{row.name}: {problem}" for row in rows for problem in row.problems]
    return {
        "certified": bool(kills) and not problems,
        "kills": len(kills),
        "kills_in_a_save": sum(row.saving for row in kills),
        "transitions": len(wanted & {row.transition for row in kills}),
        "transitions_asked_for": len(wanted),
        "runs": len({row.run for row in rows}),
        "samples_of_a_run": STEPS * GLOBAL_BATCH,
        "hung_starts": sum(row.hung for row in rows),
        "steps_redone": sum(max(0, (row.killed or 0) - row.resumed) for row in kills),
        "seen_twice": sum(row.twice for row in rows),
        "missed": sum(row.missed for row in rows),
        "largest_difference": {
            "ranks changed": max((row.difference for row in kills if not row.dropout), default=None),
            "ranks the same": max((row.difference for row in kills if row.dropout), default=None),
        },
        "bound": {"ranks changed": BOUND, "ranks the same": 0.0},
        "problems": problems,
    }


HEADER = ("ranks", "killed", "", "resumed", "steps", "loss apart", "twice", "missed", "")


def table(rows: Sequence[Row]) -> str:
    """The rows under a title a run, with columns aligned."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines, run = [], None
    for row, texts in zip((None, *rows), cells, strict=True):
        if row is not None and row.run != run:
            run = row.run
            lines.append(f"\n{run}: ZeRO-{row.stage}, dropout {'on' if row.dropout else 'off'}")
        lines.append(("  " + "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True))).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    killed = row.killed is not None
    return (
        row.transition.split(" ", 1)[1],
        f"step {row.killed}, {row.seconds:.1f} s" if killed else "-",
        "in a save" if row.saving else "",
        f"step {row.resumed}" if row.before is not None else "-",
        str(row.steps),
        f"{row.difference:.1e}" if row.difference else "0",
        str(row.twice),
        str(row.missed),
        "FAILED" if row.problems else "ok",
    )


def last_lines(rows: Sequence[Row], result: dict[str, Any]) -> str:
    """What was proved, or the problems, in words."""
    if not result["certified"]:
        problems = [line for row in rows for line in _listed(row)]
        if not result["kills"]:
            problems.append("no run was killed: each was done before its moment came")
        return "\n".join(
            [*problems, f"not certified: {max(1, len(result['problems']))} problem(s); seed {result['seed']}"]
        )
    return (
        f"certified: {result['kills']} kill(s), {result['kills_in_a_save']} of them in a save, over "
        f"{result['transitions']} of {result['transitions_asked_for']} changes of layout; {result['steps_redone']} "
        f"step(s) done again; each of the {result['samples_of_a_run']} samples of every run seen once; losses "
        f"{'; '.join([*_apart(result), *_hung(result)])}; {result['seconds']} s, seed {result['seed']}"
    )


def _listed(row: Row) -> list[str]:
    """The first problems of a start, and how many more there are; the JSON file has them all."""
    more = len(row.problems) - SHOWN_PROBLEMS
    shown = [f"{row.name}: {problem}" for problem in row.problems[:SHOWN_PROBLEMS]]
    return shown + ([f"{row.name}: and {more} more"] if more > 0 else [])


def _apart(result: dict[str, Any]) -> list[str]:
    """How far losses were apart, for each kind of run that was killed."""
    changed, same = result["largest_difference"]["ranks changed"], result["largest_difference"]["ranks the same"]
    told = [] if changed is None else [f"{changed:.1e} apart where the number of ranks changed (bound {BOUND:.0e})"]
    return told + ([] if same is None else ["bit-equal, like the final weights, where it stayed, with dropout on"])


def _hung(result: dict[str, Any]) -> list[str]:
    hung = result["hung_starts"]
    return [f"{hung} start(s) hung before a step, ended themselves and were made again"] if hung else []


def as_json(rows: Sequence[Row], result: dict[str, Any]) -> dict[str, Any]:
    """The whole certificate as plain values."""
    return {**result, "rows": [asdict(row) for row in rows]}
