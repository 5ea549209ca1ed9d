"""The files of a report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.durable import write_atomically

#: texts, and pictures [height, width, 3], by the name of their file
Files = Mapping[str, "str | NDArray[np.uint8]"]


def write(folder: Path, files: Mapping[str, str | NDArray[np.uint8]], summary: Mapping[str, Any], text: str) -> str:
    """Write files into `folder`, then report.json and report.txt; the last tells that all are there.

    Args:
        folder: made where it is missing.
        summary: content of report.json.
        text: content of report.txt.

    Returns:
        `text`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content if isinstance(content, str) else png(content))
    write_atomically(folder / "report.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "report.txt", text)
    return text


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as tab-separated text with a header."""
    written = io.StringIO()
    writer = csv.writer(written, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return written.getvalue()


def drawn(figure: Any) -> NDArray[np.uint8]:
    """A matplotlib figure as a picture [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A picture [height, width, 3] as a PNG file."""
    import matplotlib.image

    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png")
    return buffer.getvalue()
