"""Silence for messages of libraries that a user can't act on, and for work of theirs that nobody asked for."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def silence_libraries() -> None:
    """Keep transformers, datasets and torch to errors; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the stacks in C++ of a store whose other side has gone
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("torch.distributed", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|deepspeed)\b.*")


def import_deepspeed() -> None:
    """Import DeepSpeed without its log lines; its logger takes its level while it is imported."""
    logging.disable(logging.WARNING)
    try:
        import deepspeed  # noqa: F401
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Make torch.compile a no-op inside, by torch's own switch.

    DeepSpeed asks of every ZeRO optimizer whether it is Muon; importing Muon compiles its functions, for which torch
    imports all of Inductor (1.5 s a rank).
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
