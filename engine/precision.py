"""The torch type of each precision that a run may train in, and the name of each type."""

from __future__ import annotations

import torch

from engine.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS: dict[torch.dtype, Precision] = {dtype: precision for precision, dtype in DTYPES.items()}
