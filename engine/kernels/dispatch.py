"""Which implementation of an operator runs: decided here for every operator, and asked by everybody.

An answer is a back end, or plain torch: where a run asks for it (`select`), where a back end can't be built or is wrong
(a line of warning says which and why), and for inputs that no kernel takes. Our kernels run

    operator                                   on
    loss rows, gradient norm, optimizer steps  CPUs and GPUs
    the last two on lists of tensors           CPUs
    linear with a bias, linear_gelu            CPUs that multiply bf16, in bf16; GPUs, in bf16 and fp16
    geglu                                      CPUs, in fp32 and bf16; GPUs, in bf16 and fp16
    sums of a bias's gradient over loss rows   GPUs (on CPUs the loss rows make them)
    normalised_sum                             CPUs, in fp32 and bf16; GPUs, whole rows that fit into registers
    attention                                  CPUs, in fp32 and bf16; torch's flash attention of packed tokens
                                               on GPUs from compute capability 8.0, in fp16 and bf16
    attention with rotary positions            CPUs, in fp32 and bf16, but for bf16 to whole sequences on CPUs with
                                               AVX512-BF16
    the tied embedding                         CPUs, in bf16, in training, where ZeRO-3 doesn't partition it

Torch's deterministic mode changes nothing here: no result of our kernels depends on the order of threads.
To add a back end, give it functions of `engine.kernels.reference`, put it into `BACK_ENDS`, and name it in the answers
of the operators that it has beyond those.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from engine import dist
from engine.kernels import cpu, cuda, reference
from engine.kernels.cuda.selfcheck import FAMILIES, disagreement
from engine.kernels.terms import EVERYWHERE, Window

Kernels = Literal["auto", "fused", "reference"]

#: kernels that a back end has, and a run uses, all or none of
Family = Literal["loss", "norm", "adamw", "lamb", "gelu", "layer_norm", "attention", "layers"]

_selected: Kernels = "auto"
#: types of devices and families that another rank lacks
_withheld: frozenset[tuple[str, Family]] = frozenset()

logger = logging.getLogger(__name__)


def select(kernels: Kernels) -> None:
    """Choose for this process.

    Args:
        kernels: "auto", our kernels, on a GPU once they have agreed there with plain torch; "fused", ours without that
            check, where they can be built; "reference", plain torch everywhere.
    """
    global _selected, _withheld
    _selected, _withheld = kernels, frozenset()


def agree(device: torch.device) -> None:
    """Use no family on `device` that any rank lacks there, or ranks would run different collectives; collective.

    Rank 0 warns in one line which these are and on whose host.
    """
    global _withheld
    _withheld = frozenset(pair for pair in _withheld if pair[0] != device.type)
    families: tuple[Family, ...] = get_args(Family)
    lacking = {family for family in families if ours(device, family) is None}
    ranks = dist.gather_objects((socket.gethostname(), device.type, lacking))
    anywhere: set[Family] = set().union(*(lost for *_, lost in ranks))
    everywhere = [family for family in anywhere if all(family in lost for *_, lost in ranks)]
    _withheld |= {(device.type, family) for family in anywhere}
    apart = sorted(anywhere.difference(everywhere))
    if apart and dist.place()[0] == 0:
        hosts = dict.fromkeys(host for host, _, lost in ranks if lost.intersection(apart))
        logger.warning(
            "kernels: %s can't be used on %s (its own warning says why); plain torch runs instead on every rank",
            ", ".join(apart),
            ", ".join(hosts),
        )


def _on_cpu(_: torch.device, __: Family) -> ModuleType | None:
    return cpu if cpu.available() else None


def _on_gpu(device: torch.device, family: Family) -> ModuleType | None:
    return cuda if family in FAMILIES and _agrees(device.index, family, _selected != "fused") else None


@functools.cache
def _agrees(index: int | None, family: Family, compare: bool) -> bool:
    """Whether CUDA kernels can be built and, with `compare`, agree with torch on a GPU; if not, one line says why.

    Running out of memory is raised and not kept as an answer.
    """
    compiled = family != "attention"
    if not torch.cuda.is_available() or (compiled and not cuda.available()):
        return False
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    wrong = None if compiled else cuda.lacks_flash(device)
    wrong = wrong or disagreement(cuda, device, family, compare)
    if wrong is not None:
        logger.warning("CUDA kernels: %s: %s; plain torch runs instead", family, wrong)
    return wrong is None


#: by the type of a device, what gives the back end of a family; None where that can't be built or is wrong
BACK_ENDS: dict[str, Callable[[torch.device, Family], ModuleType | None]] = {"cpu": _on_cpu, "cuda": _on_gpu}


def ours(device: torch.device, family: Family = "layers") -> ModuleType | None:
    """The back end whose kernels of a family may run on `device`; None where plain torch runs."""
    plain = _selected == "reference" or (device.type, family) in _withheld
    find = None if plain else BACK_ENDS.get(device.type)
    return None if find is None else find(device, family)


def backend(device: torch.device, family: Family) -> ModuleType:
    """What computes loss rows, gradient norms and optimizer steps: every back end has them, for all inputs."""
    return ours(device, family) or reference


def tensor_lists(device: torch.device) -> ModuleType | None:
    """The back end whose gradient norm and steps take lists of tensors as well as flat ones; None: adjoin them."""
    return cpu if ours(device) is cpu else None


def adamw(device: torch.device) -> bool:
    """Whether AdamW's step is ours, not that of `torch.optim.AdamW`."""
    return ours(device, "adamw") is not None


def reads_half(device: torch.device) -> bool:
    """Whether a gradient norm of ours reads bf16 gradients, so that a step needs no fp32 ones."""
    return ours(device, "norm") is not None


def adds_bias(device: torch.device) -> bool:
    """Whether the loss's rows get the decoder's bias, and sum its gradient; else the matrix product has added it.

    Our CPU kernel does so in passing, and plain torch there as it does; on a GPU the product's epilogue is cheaper.
    """
    return device.type == "cpu"


def class_unit(device: torch.device) -> int:
    """What the classes of the decoder's products are padded to a multiple of.

    Tensor cores run at full speed where every size is a multiple of 16 bytes, the logits' last one too (NVIDIA, cuBLAS
    library, "Tensor Core Usage"), and 30,522 isn't. A padded stride alone leaves the sizes odd, and torch writes a
    product with its bias in one pass to contiguous tensors only.
    """
    return 1 if device.type == "cpu" else 64


def column_sum(x: Tensor) -> ModuleType | None:
    """The back end of sums over loss rows, which are fp32 too; None for plain torch."""
    kernels = ours(x.device, "gelu")
    return cuda if kernels is cuda and x.shape[1] % cuda.ALIGNED == 0 else None


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> ModuleType | None:
    """The back end of a linear layer, with GELU or without; None for plain torch."""
    kernels = _activation(x, weight.shape[0])
    if x.ndim != 2 or not x.dtype == weight.dtype == bias.dtype or (kernels is cpu and not cpu.multiplies_bf16()):
        return None
    return kernels


def geglu(x: Tensor) -> ModuleType | None:
    """The back end of GeGLU on rows of an activated half and a gate; None for plain torch."""
    if x.ndim != 2 or x.shape[1] % 2:
        return None
    on_cpu = x.dtype == torch.float32 and x.numel() > 0 and ours(x.device, "gelu") is cpu
    return cpu if on_cpu else _activation(x, x.shape[1] // 2)


def _activation(x: Tensor, outputs: int) -> ModuleType | None:
    """The back end of what gives [T, outputs] of `x`: on a GPU, of rows that are whole units of 16 bytes."""
    kernels = ours(x.device, "gelu") if x.numel() > 0 else None
    if kernels is cpu:
        return cpu if x.dtype == torch.bfloat16 else None
    low = x.dtype in (torch.bfloat16, torch.float16)
    return cuda if kernels is cuda and low and outputs % cuda.ALIGNED == 0 else None


def gelu_in_linear(layer: nn.Module, activation: nn.Module, plain: type[nn.Module]) -> bool:
    """Whether a linear layer is asked for the GELU of its result: the exact one, of a layer that nothing wraps.

    What an adapter or a hook adds to the result comes before GELU. `plain` is the class of a layer as it was built.
    """
    if type(activation) is not nn.GELU or activation.approximate != "none":
        return False
    hooks = [*layer._forward_hooks.values(), *layer._backward_hooks.values(), *layer._backward_pre_hooks.values()]
    # Those of ZeRO-3 only gather and release the layer's weights.
    foreign = any(getattr(hook, "__module__", "").partition(".")[0] != "deepspeed" for hook in hooks)
    return type(layer) is plain and "forward" not in vars(layer) and not foreign


def normalised_sum(
    states: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None = None
) -> ModuleType | None:
    """The back end of dropout, residual sum and layer normalisation; None for plain torch."""
    alike = all(other is None or other.dtype == states.dtype for other in (residual, weight, bias))
    kernels = ours(states.device, "layer_norm") if alike and states.numel() > 0 else None
    if kernels is cpu:
        takes = states.dtype in (torch.float32, torch.bfloat16)
    elif kernels is cuda:
        takes = all(rows is None or cuda.normalises(rows) for rows in (states, residual))
    else:
        takes = False
    return kernels if takes else None


def attention(states: Tensor, heads: int, window: Window = EVERYWHERE) -> ModuleType | None:
    """The back end of attention on packed tokens [T, H]; None for torch's, on the padded grid."""
    kernels = ours(states.device, "attention") if states.numel() else None
    if kernels is cpu:
        return cpu if _attends_on_cpu(states.dtype, states.shape[1], heads) and window == EVERYWHERE else None
    return cuda if kernels is cuda and cuda.attends(states.dtype, states.shape[1], heads) else None


def rotary_attention(projected: Tensor, heads: int, window: Window = EVERYWHERE) -> ModuleType | None:
    """The back end of attention on packed tokens [T, 3 H] that turns queries and keys itself; None for `attention`."""
    kernels = ours(projected.device, "attention") if projected.numel() else None
    if kernels is not cpu or not _attends_on_cpu(projected.dtype, projected.shape[1] // 3, heads):
        return None
    multiplies_bf16 = projected.dtype == torch.bfloat16 and window == EVERYWHERE and cpu.attends_bf16()
    return None if multiplies_bf16 else cpu


def _attends_on_cpu(dtype: torch.dtype, width: int, heads: int) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and width % (heads * cpu.LANES) == 0


def tied_embedding(weight: Tensor) -> ModuleType | None:
    """The back end that adds an embedding's gradient to the decoder's; None where each makes its own.

    Under ZeRO-3 the weight is released between the two modules, so neither gradient can wait for the other.
    """
    trained = weight.requires_grad and torch.is_grad_enabled()
    takes = weight.dtype == torch.bfloat16 and trained and not hasattr(weight, "ds_id")
    return cpu if takes and ours(weight.device) is cpu else None
