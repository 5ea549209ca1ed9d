"""Whether this rank has a GPU that it can train on; what is missing there is one line before the ranks join."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path

from engine.config import Precision
from engine.errors import UserError

SELECTOR = "https://pytorch.org/get-started/locally"
#: major compute capability from which on a GPU multiplies in a precision
CAPABILITY: dict[Precision, int] = {"bf16": 8, "fp16": 7, "fp32": 0}


def check_hidden(env: Mapping[str, str], devices: Path = Path("/dev")) -> None:
    """Refuse to train on CPUs where nobody asked for it and the machine has NVIDIA GPUs that torch can't use.

    Args:
        env: the environment.
        devices: the folder of the driver's files.

    Raises:
        UserError: says what hides them, and how to ask for CPUs.
    """
    import torch

    gpus = list(devices.glob("nvidia[0-9]*"))
    if not gpus or torch.version.cuda is None:
        return
    visible = env.get("CUDA_VISIBLE_DEVICES")
    host, instead = socket.gethostname(), "set DS_ACCELERATOR=cpu to train on CPUs"
    if visible is not None:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES: {visible!r} leaves none of the {len(gpus)} GPU(s) of {host}; give numbers such as "
            f"0,1 or unset it, or {instead}"
        )
    version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # such as 12080; 0 where it doesn't answer
    offered = f"{version // 1000}.{version % 1000 // 10}" if version else "no CUDA"
    raise UserError(
        f"torch {torch.__version__}: it is for CUDA {torch.version.cuda}, sees none of the {len(gpus)} GPU(s) of "
        f"{host}, and the driver there offers {offered}; install a newer driver, or a torch for an older CUDA "
        f"({SELECTOR}), or {instead}"
    )


def check_gpu(local_rank: int, local_size: int) -> None:
    """Refuse ranks that share a GPU, which NCCL can't do, and a GPU for which this torch has no code.

    Raises:
        UserError: names the GPU and the remedy.
    """
    import torch

    count, host = torch.cuda.device_count(), socket.gethostname()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK: {local_rank} is one of {max(local_size, local_rank + 1)} rank(s) on {host}, of which each "
            f"needs a GPU, and torch sees {count}; start fewer ranks, show each all GPUs of its node "
            "(CUDA_VISIBLE_DEVICES; srun --gpu-bind=none), or set DS_ACCELERATOR=cpu to train on CPUs"
        )
    capability, architectures = torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list()
    if torch.version.cuda and architectures and not any(runs_on(name, *capability) for name in architectures):
        major, minor = capability
        raise UserError(
            f"torch {torch.__version__}: it has no code for {torch.cuda.get_device_name(local_rank)} (sm_{major}{minor}"
            f") on {host}, only {' '.join(architectures)}; install one that has ({SELECTOR})"
        )


def check_precision(precision: Precision) -> None:
    """Refuse a precision in which this rank's GPU doesn't multiply: torch would emulate it, many times as slowly.

    Raises:
        UserError: names the GPU and the precisions that it has.
    """
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    if major < CAPABILITY[precision]:
        others = [name for name, needed in CAPABILITY.items() if needed <= major]
        raise UserError(
            f"train.precision: {precision!r} needs compute capability {CAPABILITY[precision]}.0 and "
            f"{torch.cuda.get_device_name()} on {socket.gethostname()} has {major}.{minor}; set {' or '.join(others)}"
        )


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for sm_90, sm_90a or compute_90 (which the driver compiles) runs on a GPU of a capability."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
    if match is None:
        return False
    compiled = (int(match[2]), int(match[3]))
    return compiled <= (major, minor) and (match[1] == "compute" or compiled[0] == major)
