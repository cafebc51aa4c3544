"""What weights, gradients and optimizer states take, by ZeRO stage."""

from dataclasses import dataclass

from ..ranks import use_accelerator

GPUS_PER_NODE = 8
WORKSPACES = 64 * 1024**2  # bytes of torch's allocator that cuBLAS works in


@dataclass(frozen=True)
class Sharding:
    """How a run's states are shared out.

    Attributes:
        gpus: ranks, in nodes of `GPUS_PER_NODE`.
        stage: of ZeRO; 0: none.
        offload: stage 3 with optimizer states and weights on the CPU.
        bucket: gradients that are sent at once, in number.
        overlap: whether one such bucket is filled while another is sent.
        weight_bytes: of a weight and of its gradient: 2 in bf16, 4 in float32.
    """

    gpus: int
    stage: int
    offload: bool = False
    bucket: int = 0
    overlap: bool = False
    weight_bytes: int = 2


@dataclass(frozen=True)
class States:
    """Bytes per GPU.

    Attributes:
        held: weights and optimizer states, which are there all the time.
        at_step: with the gradients, when the optimizer steps.
        gradient_share: which part of the gradients a rank has at the end of a backward pass, beside `held`.
        buffers: gradients that are being sent.
        cpu: bytes of a node's CPU, of what is offloaded; its highest, while the model is built.
    """

    held: int
    at_step: int
    gradient_share: float
    buffers: int
    cpu: int


def model_states(total: int, largest: int, sharding: Sharding) -> States:
    """Return the states of a model with AdamW.

    Per parameter: the weight and its gradient; in the optimizer the float32 master weight, two moments and, while it
    steps, the gradient in float32. Stage 1 shares out what the optimizer has, stage 2 the gradients as well, stage 3
    the weights too, of which the largest layer is gathered whole (Rajbhandari et al., 2020, section 3).

    Args:
        total: parameters of the model.
        largest: parameters of its largest layer.
    """
    gpus, stage, width = sharding.gpus, sharding.stage, sharding.weight_bytes
    of_optimizer = 1 / gpus if stage else 1.0
    of_gradients = 1 / gpus if stage >= 2 else 1.0
    buffers = min(sharding.bucket, total) * width * (2 if sharding.overlap else 1) if stage else 0
    # without ZeRO float32 weights are their own masters, and their gradients are used as they are
    per_parameter = 8 if width == 4 and not stage else 12
    # the gradients in float32; ZeRO 1 and 2 first copy them into one piece, and keep that too
    stepping = {(0, 2): 4, (0, 4): 0, (1, 2): 6, (2, 2): 6}.get((stage, width), 4)
    if sharding.offload:
        cpu, gpu = _offloaded(total, largest, gpus)
        return States(gpu + WORKSPACES, gpu + WORKSPACES, 0.0, buffers, cpu)
    weights = 2 * width * largest + width * total / gpus if stage == 3 else width * total
    held = weights + per_parameter * total * of_optimizer
    gradients = width * total * of_gradients
    if stage == 3:  # there they have a place of their own, which is kept
        held, gradients = held + gradients + buffers, 0
    at_step = held + gradients + stepping * total * of_optimizer
    return States(
        int(held) + WORKSPACES,
        int(at_step) + WORKSPACES,
        0.0 if stage == 3 else of_gradients,
        0 if stage == 3 else buffers,
        0,
    )


def _offloaded(total: int, largest: int, gpus: int) -> tuple[int, int]:
    """Return bytes on a node's CPU and on each GPU, by DeepSpeed's own estimator."""
    use_accelerator()
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    per_node, nodes = min(gpus, GPUS_PER_NODE), -(-gpus // GPUS_PER_NODE)
    cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
        total, largest, per_node, nodes, cpu_offload=True, cpu_offload_params=True, zero_init=False
    )
    return cpu, gpu
