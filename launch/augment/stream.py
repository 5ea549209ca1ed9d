"""From an input to an output, chunk by chunk, as predictions go; a killed command goes on when it is given again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.data.augment.draws import draws_for
from engine.data.labelled.files import label_of
from engine.data.labelled.tables import place
from engine.data.store.executor import open_executor
from engine.errors import UserError
from engine.predict.journal import Journal
from engine.predict.output import lines_of
from engine.predict.rows import Chunk, Chunks, in_order
from launch.augment.examples import examples_of, open_rows
from launch.augment.options import MARK, AugmentConfig
from launch.augment.worker import Made, make_rows, method_of

#: options that change no row
FREE = ("input", "output", "model", "device", "processes")


@dataclass(frozen=True)
class Summary:
    """What a command did."""

    rows: int
    """of the input"""
    earlier: int
    """of them that an earlier command had done"""
    new: int
    missing: int
    """copies that would have been the same as another row"""
    seconds: float

    def line(self, output: str) -> str:
        """What was done, in words."""
        if self.earlier == self.rows:
            return f"nothing to do: {output} has the new rows of all {self.rows:,} rows"
        told = f"{self.new:,} new rows of {self.rows - self.earlier:,} in {self.seconds:.1f} s"
        told += f" ({self.new / self.seconds:,.0f} a second)"
        told += f" after {self.earlier:,} of an earlier command" if self.earlier else ""
        told += f"; {self.missing:,} could not be made different from the others" if self.missing else ""
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
        if MARK in first.record:
            raise UserError(f"input: {config.input!r} has a column {MARK!r}, so it is augmented; give the original")
        examples = examples_of(config, first.record)
        examples.texts(first)
        lines = lines_of(config.output, config.input, list(first.record), {MARK: ()})
        made_with = {name: value for name, value in asdict(config).items() if name not in FREE}
        made_with["method_fingerprint"] = method_of(config).fingerprint
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
    return Summary(sink.progress.rows, earlier.rows, new, missing, time.monotonic() - begun)


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
