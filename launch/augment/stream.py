"""From an input to an output, chunk by chunk, as predictions go; a killed command goes on when it is given again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.data.augment.draws import draws_for
from engine.data.labelled.files import label_of
from engine.data.labelled.tables import place
from engine.data.store.executor import open_executor
from engine.errors import UserError
from engine.predict.journal import Journal
from engine.predict.output import lines_of
from engine.predict.rows import Chunk, Chunks, Row, in_order
from launch.augment.examples import Examples, examples_of, open_rows
from launch.augment.options import CONFIDENCE, MARK, AugmentConfig
from launch.augment.worker import Made, judge, make_rows, method_of

#: options that change no row
FREE = ("input", "output", "model", "keep_by", "forward", "back", "device", "processes")


@dataclass(frozen=True)
class Summary:
    """What a command did."""

    rows: int
    """of the input"""
    earlier: int
    """of them that an earlier command had done"""
    new: int
    missing: int
    """copies that could not be made, or rows that got no label"""
    seconds: float
    pseudo: bool = False
    """whether rows were labelled instead of made"""

    def line(self, output: str) -> str:
        """What was done, in words."""
        if self.earlier == self.rows:
            return f"nothing to do: {output} has the new rows of all {self.rows:,} rows"
        kind = "labels" if self.pseudo else "new rows"
        told = f"{self.new:,} {kind} of {self.rows - self.earlier:,} rows in {self.seconds:.1f} s"
        told += f" ({self.new / self.seconds:,.0f} a second)"
        told += f" after {self.earlier:,} of an earlier command" if self.earlier else ""
        why = "rows are not sure enough" if self.pseudo else "could not be made: all tries were refused or nothing new"
        told += f"; {self.missing:,} {why}" if self.missing else ""
        return f"{told}: {output}"


def augment_file(
    config: AugmentConfig, *, overwrite: bool = False, read: Callable[[int], object] = lambda _: None
) -> Summary | None:
    """Write the rows of an input with new rows made of them; None on a rank of mpirun that only serves.

    Args:
        overwrite: whether an output that is there may go.
        read: called now and then with the bytes that were read of the input.

    Raises:
        UserError: anything that is wrong with options, input, model or output.
    """
    begun = time.monotonic()
    config.validate()
    with open_executor(config.processes) as opened:
        if opened is None:
            return None
        executor, workers = opened
        wanted = balanced(config) if config.balance else None
        first, rows = open_rows(config, read)
        added = _added(config, first)
        examples = examples_of(config, first.record)
        examples.texts(first)
        lines = lines_of(config.output, config.input, list(first.record), dict.fromkeys(added, ()))
        made_with = _made_with(config, examples)
        chunks = Chunks(rows, config.chunk_rows)
        new = missing = 0
        with Journal(Path(config.output), made_with, overwrite=overwrite) as sink:
            earlier = sink.progress
            if earlier.rows and chunks.skip(earlier.rows) != earlier.digest:
                raise UserError(
                    f"output: {config.output!r} has the new rows of {earlier.rows:,} rows, which are not the first of "
                    f"{config.input}; give that input as it was, another output, or overwrite"
                )
            if not earlier.rows:
                sink.write(lines.head(), 0, "", 0)

            def submit(chunk: Chunk) -> Future[Made]:
                copies = [config.copies if wanted is None else wanted.get(row.position, 0) for row in chunk.rows]
                return executor.submit(make_rows, config, examples, chunk.rows, copies)

            for chunk, made in in_order(submit, chunks, workers):
                sink.write(lines.lines(made.rows, made.marks), len(chunk.rows), chunk.digest, 0)
                new, missing = new + made.new, missing + made.missing
            sink.finish()
    return Summary(sink.progress.rows, earlier.rows, new, missing, time.monotonic() - begun, pseudo=MARK not in added)


def _added(config: AugmentConfig, first: Row) -> tuple[str, ...]:
    """The new columns."""
    if config.method != "pseudo_labels":
        if MARK in first.record:
            raise UserError(f"input: {config.input!r} has a column {MARK!r}, so it is augmented; give the original")
        return (MARK,)
    for name in (config.label, CONFIDENCE):
        if name in first.record:
            raise UserError(f"label: {config.input!r} has a column {name!r}, where a label would go; give rows without")
    return (config.label, CONFIDENCE)


def _made_with(config: AugmentConfig, examples: Examples) -> dict[str, Any]:
    """What decides the output beside the input, for the journal."""
    made_with = {name: value for name, value in asdict(config).items() if name not in FREE}
    if config.method != "pseudo_labels":
        made_with["method_fingerprint"] = method_of(config).fingerprint
    if config.method == "pseudo_labels" or config.keep_by is not None:
        made_with["classifier"] = judge(config, examples)[1]
    return made_with


def balanced(config: AugmentConfig) -> Mapping[int, int]:
    """New rows of each row, by its position, with which every class is as frequent as the most frequent one.

    Those of a class are dealt evenly over its rows; which get one more is drawn.

    Raises:
        UserError: what is wrong with the input, or a label that is none.
    """
    _, rows = open_rows(config)
    members: dict[str, list[int]] = {}
    for row in rows:
        label = label_of(row.record[config.label], config.label, place(config.input, row.position), None)
        members.setdefault(label, []).append(row.position)
    most = max(map(len, members.values()))
    wanted: Counter[int] = Counter()
    for number, positions in enumerate(members[label] for label in sorted(members)):
        each, more = divmod(most - len(positions), len(positions))
        chosen = draws_for(config.seed, number)[0].some_of(positions, more)
        wanted.update(dict.fromkeys(positions, each))
        wanted.update(chosen)
    return wanted
