"""From an input to an output, chunk by chunk: memory holds some chunks, whatever the size of the input."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from engine.data.store.executor import open_executor
from engine.errors import UserError
from engine.predict.journal import Journal, Progress, Sink, StandardOutput
from engine.predict.model import ModelFolder, open_folder
from engine.predict.options import STANDARD, PredictConfig
from engine.predict.output import lines_of, suffix_of
from engine.predict.predictor import Predictor, predictor_class, predictor_of
from engine.predict.rows import Chunk, Chunks, InputColumns, Row, in_order, input_path, peek, read_rows
from engine.predict.worker import Computed, compute_chunk, device_of, release

#: options that change no prediction beyond rounding, or that something else tells
FREE = ("model", "base", "input", "output", "device", "processes")


@dataclass(frozen=True)
class Summary:
    """What a prediction did."""

    rows: int
    """of the output"""
    earlier: int
    """of them that an earlier run had written"""
    truncated: int
    """rows whose text was cut at `length` tokens"""
    length: int
    seconds: float

    def line(self, output: str) -> str:
        """What was done, in words."""
        if self.earlier == self.rows:
            return f"nothing to do: {output} has the predictions of all {self.rows:,} rows"
        own = self.rows - self.earlier
        told = f"predicted {own:,} rows in {self.seconds:.1f} s ({own / self.seconds:,.0f} a second)"
        told += f" after {self.earlier:,} of an earlier run" if self.earlier else ""
        told += f"; {self.truncated:,} texts were cut at {self.length} tokens" if self.truncated else ""
        return f"{told}: {output}"


def predict_file(
    config: PredictConfig, *, overwrite: bool = False, read: Callable[[int], object] = lambda _: None
) -> Summary | None:
    """Write the predictions of every row of an input; None on a rank of mpirun that only serves.

    Args:
        overwrite: whether an output that is there may go.
        read: called now and then with the bytes that were read of the input.

    Raises:
        UserError: anything that is wrong with model, options, input or output. What was written before a bad row stays,
            and another run goes on after it.
    """
    begun = time.monotonic()
    config.validate()
    _check_paths(config)
    device_of(config.device)
    with open_executor(config.processes) as opened:
        if opened is None:
            return None
        folder = open_folder(config.model, config.base)
        columns = columns_of(config, folder)
        first, rows = peek(read_rows(config.input, config.format, columns, read), input_path(config.input))
        config = resolved(config, columns, first)
        predictor = predictor_of(folder, config)
        predictor.begin(first)
        new = {config.prefix + name: keys for name, keys in predictor.columns.items()}
        lines = lines_of(config.output, str(input_path(config.input)), list(first.record), new)
        chunks = Chunks(rows, config.chunk_rows)
        with _sink(config, folder, predictor, overwrite) as sink:
            earlier = sink.progress
            _go_on(chunks, earlier, config)
            if not earlier.rows:
                sink.write(lines.head(), 0, "", 0)
            for chunk, computed in computations(config, chunks, *opened):
                named = [prefixed(config, row) for row in computed.columns]
                content = lines.lines(chunk.rows, named)
                sink.write(content, len(chunk.rows), chunk.digest, computed.truncated)
            sink.finish()
    told = sink.progress
    return Summary(told.rows, earlier.rows, told.truncated, predictor.length, time.monotonic() - begun)


def predict_rows(config: PredictConfig, records: Iterable[Mapping[str, Any] | str]) -> Iterator[dict[str, Any]]:
    """Rows that are in memory with their new columns, one by one; a text alone is a row of it.

    Raises:
        UserError: as `predict_file`.
    """
    config.validate()
    folder = open_folder(config.model, config.base)
    columns = columns_of(config, folder)
    column = columns.text or columns.usual[0]
    rows = (
        Row(number, {column: record} if isinstance(record, str) else record) for number, record in enumerate(records, 1)
    )
    first = next(rows, None)
    if first is None:
        return
    columns.require(list(first.record), config.input)
    config = resolved(config, columns, first)
    predictor = predictor_of(folder, config)
    predictor.begin(first)
    taken = [name for name in predictor.columns if config.prefix + name in first.record]
    if taken:
        raise UserError(f"prefix: the rows have a column {config.prefix + taken[0]!r} already; give another prefix")
    with open_executor(config.processes) as opened:
        assert opened is not None
        for chunk, computed in computations(config, Chunks(chain([first], rows), config.chunk_rows), *opened):
            for row, new in zip(chunk.rows, computed.columns, strict=True):
                yield {**row.record, **prefixed(config, new)}


def prefixed(config: PredictConfig, columns: Mapping[str, Any]) -> dict[str, Any]:
    """New columns under their full names."""
    return {config.prefix + name: value for name, value in columns.items()}


def columns_of(config: PredictConfig, folder: ModelFolder) -> InputColumns:
    """The columns of the texts: as given, else those of the run, else as such columns are usually called.

    Raises:
        UserError: one column for two purposes.
    """
    kind = predictor_class(folder)
    text, pair = kind.run_columns(folder.run)
    more = kind.more_columns(config, folder.run)
    columns = InputColumns(config.text or text or "", config.text_pair or pair, "", more, kind.usual)
    columns.check()
    return columns


def resolved(config: PredictConfig, columns: InputColumns, first: Row) -> PredictConfig:
    """The options with the columns of the texts, the default one as the first row has it."""
    text = columns.text or next(name for name in columns.usual if name in first.record)
    return replace(config, text=text, text_pair=columns.text_pair)


def _check_paths(config: PredictConfig) -> None:
    suffix_of(config.output)
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1:
        raise UserError(f"WORLD_SIZE: {world} ranks of a launcher are not used; start it without, and give processes")
    if STANDARD not in (config.input, config.output) and Path(config.input).resolve() == Path(config.output).resolve():
        raise UserError(f"output: {config.output!r} is the input; give another path")


def _sink(
    config: PredictConfig, folder: ModelFolder, predictor: Predictor, overwrite: bool
) -> AbstractContextManager[Sink]:
    if config.output == STANDARD:
        return nullcontext(StandardOutput())
    options = {name: value for name, value in asdict(config).items() if name not in FREE}
    made_with = {"model": folder.fingerprint(), **options, "max_length": predictor.length}
    return Journal(Path(config.output), made_with, overwrite=overwrite)


def _go_on(chunks: Chunks, earlier: Progress, config: PredictConfig) -> None:
    """Pass over the rows that an earlier run wrote."""
    if earlier.rows and chunks.skip(earlier.rows) != earlier.digest:
        raise UserError(
            f"output: {config.output!r} has predictions of {earlier.rows:,} rows, which are not the first ones of "
            f"{input_path(config.input)}; give that input as it was, another output, or overwrite"
        )


def computations(
    config: PredictConfig, chunks: Iterable[Chunk], executor: Executor, workers: int
) -> Iterator[tuple[Chunk, Computed]]:
    """The chunks in their order, each with its new columns; a bad row comes up after all chunks before it."""
    try:
        yield from in_order(lambda chunk: executor.submit(compute_chunk, config, chunk.rows), chunks, workers)
    finally:
        release()
