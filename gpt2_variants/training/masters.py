"""The float32 master weights that an engine keeps beside weights of lower precision."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _unflatten_dense_tensors

from ..models.modeling_base import Float32Parameters


def float32_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter, of the modules that are `Float32Parameters`."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, Float32Parameters)
        for name, parameter in module.named_parameters(recurse=False)
    }


class Float32Masters:
    """Keeps parameters that count in float32 exact in an engine that computes in bf16.

    DeepSpeed casts every parameter, whatever the model says (it spares buffers only), and takes the float32 masters
    from the rounded values. So the masters are set to the unrounded ones, and handed back to the modules after each
    optimizer step. A collective, of a few kilobytes per layer; without such parameters or in float32: nothing.

    Args:
        unrounded: name -> initial float32 value, of these parameters and of any other whose master is to be exact.
    """

    def __init__(self, engine: Any, unrounded: dict[str, torch.Tensor]):
        self._engine = engine
        for name, parameter in engine.module.named_parameters():
            if name in unrounded and parameter.dtype.itemsize < torch.float32.itemsize:
                _set_master(engine, parameter, unrounded[name].to(engine.device))
        self._handed_back = [
            (engine.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
            for name, parameter in float32_parameters(engine.module).items()
            if parameter.dtype.itemsize < torch.float32.itemsize
        ]
        self.refresh()

    def refresh(self) -> None:
        """Hand the masters to the modules. To be called by all ranks after whatever changes the parameters."""
        masters = _masters(self._engine, [parameter for *_, parameter in self._handed_back])
        for (module, name, _), master in zip(self._handed_back, masters, strict=True):
            module.set_master(name, master)


def float32_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """Return name -> float32 master weight on the CPU, on rank 0; None elsewhere. A collective."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        weight = _master(engine, parameter)
        if engine.global_rank == 0:
            weights[name] = weight.detach().float().cpu().clone()
    return weights or None


def _master(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Return the float32 master of `parameter`, whole. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    if _has_zero_master(parameter):
        return safe_get_full_fp32_param(parameter)
    return _stage_0_master(engine, parameter)


@torch.no_grad()
def _masters(engine: Any, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Return the float32 masters of `parameters`, whole; ZeRO 1 and 2 take one all-reduce for all. A collective."""
    if not all(hasattr(parameter, "_hp_mapping") for parameter in parameters):
        return [_master(engine, parameter) for parameter in parameters]
    if not parameters:
        return []
    parts: list[Any] = list(parameters)  # with what DeepSpeed hung on them
    whole = torch.zeros(sum(part.numel() for part in parts), device=engine.device)
    masters = whole.split([part.numel() for part in parts])
    for part, master in zip(parts, masters, strict=True):
        if part._hp_mapping is not None:  # this rank holds some of it
            held = part._hp_mapping.lp_fragment_address
            master.narrow(0, held.start, held.numel).copy_(part._hp_mapping.get_hp_fragment())
    dist.all_reduce(whole, group=parts[0]._dp_group)
    return [master.view_as(part) for part, master in zip(parts, masters, strict=True)]


def _set_master(engine: Any, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set the float32 master of `parameter`, whole, to `value`. On all ranks."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):
        # Not the whole: DeepSpeed 0.19 then reads beyond the end of a value that the ranks cannot share out evenly.
        cut: Any = parameter  # with what DeepSpeed hung on it
        size = cut.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * cut.ds_process_group.size() - value.numel()))
        safe_set_local_fp32_param(parameter, padded.narrow(0, size * cut.ds_process_group.rank(), size))
    elif _has_zero_master(parameter):
        safe_set_full_fp32_param(parameter, value)
    else:
        _stage_0_master(engine, parameter).data.copy_(value)


def _has_zero_master(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")  # ZeRO stages 1 and 2; stage 3


def _stage_0_master(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Without ZeRO: what the engine's optimizer holds; in float32 the parameter is its own master."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups"):
        return parameter
    if hasattr(optimizer, "fp32_groups_flat"):  # with a fused Adam the masters of a group are one flat tensor
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        masters = [_unflatten_dense_tensors(group.detach(), like) for group, like in flat]
    else:
        masters = optimizer.fp32_groups
    for halves, fulls in zip(optimizer.fp16_groups, masters, strict=True):
        for half, full in zip(halves, fulls, strict=True):
            if half is parameter:
                return full
    raise RuntimeError("DeepSpeed's optimizer holds no master of a parameter")
