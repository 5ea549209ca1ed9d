"""What `zerobert certify` does: the runs, the ranks of their starts, and at which step each of them is killed."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UserError

STEPS = 40
GLOBAL_BATCH = 16
SAVE_INTERVAL = 2
#: kills of one run; each start needs steps for a checkpoint of its own and for moments to choose from
MOST_KILLS_OF_A_RUN = (STEPS - 2) // (3 * SAVE_INTERVAL)


@dataclass(frozen=True)
class Plan:
    """A run and its starts."""

    stage: int
    ranks: tuple[int, ...]
    """of each start; a kill lies between two"""
    dropout: bool
    """off where the number of ranks changes, since its generators belong to ranks"""
    repeat: int = 0
    """counts runs with the same route"""

    @property
    def kills(self) -> int:
        return len(self.ranks) - 1

    @property
    def name(self) -> str:
        """Of the run's folder."""
        parts = [f"zero{self.stage}", *map(str, self.ranks)]
        return "-".join([*parts, *["dropout"] * self.dropout, *[f"again{self.repeat}"] * (self.repeat > 0)])

    @property
    def reference(self) -> Plan:
        """The run that it is compared with: the same first start, never killed."""
        return Plan(self.stage, self.ranks[:1], self.dropout)


def parse_stages(text: str) -> list[int]:
    """ZeRO stages such as "1,2,3".

    Raises:
        UserError: something else.
    """
    if not re.fullmatch(r"[0-3](,[0-3])*", text):
        raise UserError(f"stages: {text!r} is not allowed; give ZeRO stages such as 1,2,3")
    return list(dict.fromkeys(map(int, text.split(","))))


def parse_routes(text: str) -> list[tuple[int, ...]]:
    """Routes such as "1-2-4-2-1,2-2": for each the ranks of a run's starts.

    Raises:
        UserError: something else, too long a route, or ranks that don't divide the global batch.
    """
    if not re.fullmatch(r"\d+(-\d+)+(,\d+(-\d+)+)*", text):
        raise UserError(
            f"routes: {text!r} is not allowed; give ranks before and after each kill, such as 1-2-4-2-1,2-2"
        )
    routes = [tuple(map(int, route.split("-"))) for route in text.split(",")]
    for route in routes:
        shown = "-".join(map(str, route))
        if any(ranks < 1 or GLOBAL_BATCH % ranks for ranks in route):
            raise UserError(f"routes: {shown!r} is not allowed; give numbers of ranks that divide {GLOBAL_BATCH}")
        if len(route) - 1 > MOST_KILLS_OF_A_RUN:
            raise UserError(
                f"routes: {shown!r} has {len(route) - 1} kills; give at most {MOST_KILLS_OF_A_RUN}, or several routes"
            )
    return list(dict.fromkeys(routes))


def plan_runs(stages: Sequence[int], routes: Sequence[tuple[int, ...]], kills: int, repeat: int = 0) -> list[Plan]:
    """Deal kills to runs: first along every route at every stage, then one more to those that have the fewest.

    A run that has more kills than its route walks it back and forth. With too few kills the last runs are left out.
    """
    assert kills >= 1
    wanted = [(stage, route) for route in routes for stage in stages]
    dealt, left = [], kills
    for _, route in wanted:
        dealt.append(min(len(route) - 1, left))
        left -= dealt[-1]
    while left and min(dealt) < MOST_KILLS_OF_A_RUN:
        dealt[dealt.index(min(dealt))] += 1
        left -= 1
    walks = [(stage, walk(route, kills + 1)) for (stage, route), kills in zip(wanted, dealt, strict=True) if kills]
    runs = [Plan(stage, ranks, len(set(ranks)) == 1, repeat) for stage, ranks in walks]
    return runs + (plan_runs(stages, routes, left, repeat + 1) if left else [])


def walk(route: tuple[int, ...], starts: int) -> tuple[int, ...]:
    """The first `starts` stations of going along a route back and forth: (1, 2, 4) -> 1, 2, 4, 2, 1, 2, ..."""
    tour = route + route[-2:0:-1]
    return tuple(tour[index % len(tour)] for index in range(starts))


def kill_after(moments: random.Random, resumed: int, kills_left: int) -> int:
    """After which step to kill a start.

    By then it has saved a whole checkpoint of its own, for a save ends at the latest when the next one begins. And
    there are steps left for the kills to come.

    Args:
        moments: where the choice comes from.
        resumed: the step that the start goes on from.
        kills_left: of the run, this one included.
    """
    first = resumed + 2 * SAVE_INTERVAL + 1
    return moments.randint(first, max(first, resumed + (STEPS - 2 - resumed) // kills_left))


def least_resumed(killed: int) -> int:
    """From which step at least a run goes on that was killed after this one: all saves but the last are complete."""
    return max(0, (killed - 1) // SAVE_INTERVAL * SAVE_INTERVAL - SAVE_INTERVAL)
