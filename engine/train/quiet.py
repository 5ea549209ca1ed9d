"""Silence for messages of libraries that a user can't act on."""

from __future__ import annotations

import logging
import os
import warnings


def silence_libraries() -> None:
    """Keep transformers, datasets and torch to errors; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
