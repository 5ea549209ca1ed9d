"""What a run asks of CUDA: of its libraries by the environment before they load, of torch once the GPU is known."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from engine.errors import UserError

if TYPE_CHECKING:
    import torch

    from engine.config import TrainConfig

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
#: the workspaces with which cuBLAS gives the same bits in every run (its manual, "Results reproducibility")
REPEATABLE = (":4096:8", ":16:8")
#: variables that set torch's allocator, the first as all supported versions read it
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def prepare(env: MutableMapping[str, str], deterministic: bool) -> None:
    """Set what CUDA's libraries read once as they start; a user's own values stay.

    Segments of the allocator expand, since every micro-batch has another number of tokens and fixed ones fragment.
    """
    if env.get("DS_ACCELERATOR") == "cpu":
        return
    if not any(env.get(name) for name in ALLOCATOR):
        env[ALLOCATOR[0]] = "expandable_segments:True"
    if deterministic and not env.get(WORKSPACE):
        env[WORKSPACE] = REPEATABLE[0]


def check(env: Mapping[str, str], deterministic: bool, accelerator: str) -> None:
    """Compare a user's own value with the run.

    Raises:
        UserError: cuBLAS would not repeat its bits on the accelerator ("cuda", "cpu", ...).
    """
    value = env.get(WORKSPACE)
    if accelerator == "cuda" and deterministic and value not in REPEATABLE:
        raise UserError(
            f"{WORKSPACE}: {value!r} contradicts train.deterministic, with which it is {' or '.join(REPEATABLE)}; "
            "unset it, or set train.deterministic false"
        )


def choose(train: TrainConfig, device: torch.device) -> None:
    """Choose how the run computes, before it computes anything, since memory depends on it; collective.

    The kernels' check of themselves takes memory too, which a trial of micro-batches must not have to share.
    """
    import torch

    from engine.kernels import dispatch

    dispatch.select(train.kernels)
    if train.deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports Inductor, slowly
        torch.use_deterministic_algorithms(train.deterministic)
    torch.autograd.set_detect_anomaly(train.detect_anomaly)
    dispatch.agree(device)


def settle(device: torch.device) -> None:
    """Set how torch multiplies and attends on this rank's GPU; nothing on CPUs.

    cuDNN's attention makes a plan for each shape, without a bound, and every micro-batch has another. fp32 products
    take TF32, several times as fast and the same bits in every run, so train.deterministic keeps it; the variable
    NVIDIA_TF32_OVERRIDE=0 of CUDA's libraries turns it off.
    """
    import torch

    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("high")
