"""What a run would be, said before it starts: steps, tokens, parameters, FLOPs, DeepSpeed config, memory per GPU."""

import copy
import functools
import json

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .config.options import Options
from .config.plan import DataFacts, Plan, facts_of, make_plan
from .config.resolve import load_data
from .models.loss_head import CHUNK_ROWS
from .models.modeling_base import VariantLMHeadModel, recompute_blocks
from .ranks import use_accelerator, world_size
from .registry import GPT2_VOCABULARY

# WikiText-103 as the published runs cut it: 114,003 blocks of 1024 tokens.
WIKITEXT_TOKENS = 116_739_072
GIB = 1024**3
GPUS_PER_NODE = 8
NUMBERS_OF_GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)

BYTES_PER_LOGIT = 8  # of one chunk of the loss at its peak: logits in bf16, probabilities in float32, gradient in bf16
BYTES_PER_WEIGHT = 8  # of the loss head: its gradient in float32 and a chunk's part in bf16, the padded weight in bf16


def describe(options: Options) -> str:
    """What `options` ask for, as text. Reads the data, but for WikiText-103, of known size. Raises `UsageError`."""
    if options.dataset == "wikitext-103":
        blocks, vocabulary = WIKITEXT_TOKENS // options.block_size, GPT2_VOCABULARY
        description = f"wikitext-103: about {blocks:,} blocks of {options.block_size} (not read for a dry run)"
        facts = DataFacts(blocks, None, description, None)
    else:
        data = load_data(options)
        facts, vocabulary = facts_of(data), data.vocab_size
    plan = make_plan(options, facts, options.make_config(vocabulary), world_size())
    model = plan.spec.on_meta(plan.model_config())
    tokens = plan.total_steps * plan.train_batch_size * plan.block_size
    settings = ", ".join(f"{k} {v}" for k, v in plan.optimizer["params"].items())
    rate = "by its schedule" if plan.learning_rate is None else f"{plan.learning_rate:g}"
    lines = [
        f"variant            {plan.variant}: {plan.spec.summary}",
        f"data               {plan.data}",
        f"parameters         {plan.num_parameters:,}",
        f"steps              {plan.total_steps:,} of {plan.train_batch_size} x {plan.block_size} tokens, "
        f"{plan.warmup_steps:,} of them warm-up",
        f"training tokens    {tokens:,}",
        f"FLOPs per token    {plan.flops_per_token:.4g} (6N + 12LES per position, "
        f"{model.positions(plan.block_size)} positions a sequence)",
        f"FLOPs in all       {plan.flops_per_token * tokens:.4g}",
        f"batch              {plan.train_batch_size} = {plan.per_device_train_batch_size} per GPU x "
        f"{plan.gradient_accumulation_steps} accumulated x {plan.world_size} GPUs",
        f"optimizer          {plan.optimizer['type']}, learning rate {rate}, weight decay {plan.weight_decay:g}, "
        f"clipping {plan.gradient_clipping:g}" + (f" ({settings})" if settings else ""),
        f"schedule           {plan.schedule['type']}",
        f"precision          {plan.precision}",
        f"chosen for you     {', '.join(plan.chosen) or 'nothing'}",
        *memory_table(plan, model),
        "DeepSpeed config",
        json.dumps(plan.ds_config, indent=2),
    ]
    return "\n".join(lines)


def memory_table(plan: Plan, model: VariantLMHeadModel) -> list[str]:
    """Estimated memory for 1 to 1,024 GPUs and every ZeRO stage, as lines of text; the run's own stage is marked."""
    total = model.num_parameters()
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    own = "offload" if plan.offload else f"ZeRO {plan.zero_stage}" if plan.zero_stage else "no ZeRO"
    choices = {f"ZeRO {stage}": (stage, False) for stage in (1, 2, 3)} | {"offload": (3, True)}
    if own == "no ZeRO":
        choices = {own: (0, False), **choices}
    heads = [f"{name}*" if name == own else name for name in choices]
    lines = [
        "memory             estimate in GiB per GPU, in bf16: activations; model states + activations by ZeRO stage",
        "                   (* this run's). Without communication buffers, CUDA's own and fragmentation; without",
        f"                   torch.compile, which keeps fewer activations. Nodes of {GPUS_PER_NODE} GPUs",
        f"{'':19}{'GPUs':>5} {'sequences':>9} {'activations':>11}"
        + "".join(f"{h:>9}" for h in heads)
        + f"{'CPU of a node, offload':>24}",
    ]
    batch, accumulation = plan.train_batch_size, plan.gradient_accumulation_steps
    for gpus in NUMBERS_OF_GPUS:
        micro = max(batch // (gpus * accumulation), 1)
        activations = activation_bytes(model, micro, plan.block_size, plan.gradient_checkpointing)
        states = {name: model_state_bytes(total, largest, gpus, *choice) for name, choice in choices.items()}
        lines.append(
            f"{'':19}{gpus:>5,} {micro:>9} {activations / GIB:>11.1f}"
            + "".join(f"{(gpu + activations) / GIB:>9.1f}" for gpu, _ in states.values())
            + f"{states['offload'][1] / GIB:>24.1f}"
        )
    if batch < NUMBERS_OF_GPUS[-1]:
        lines.append(f"                   beyond {batch} GPUs with --train_batch_size of a multiple of their number")
    return lines


def model_state_bytes(total: int, largest: int, gpus: int, stage: int, offload: bool = False) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer states (per GPU, per node's CPU) in bf16 with AdamW.

    Stages 2 and 3 by DeepSpeed's own estimators; the CPU's figure is its highest, while the model is built. Per
    parameter they count 2 bytes for the weight, 2 for its gradient, and 16 for what the optimizer holds: float32
    weight, gradient and two moments. DeepSpeed has no estimator for stages 0 and 1: the same bytes, of which stage 1
    shares out the optimizer's 16 only, and stage 0 none (Rajbhandari et al., 2020, section 3, with 12: without the
    float32 gradient, which DeepSpeed makes for its step).

    Args:
        total: parameters of the model.
        largest: parameters of its largest layer, which stage 3 gathers whole.
        gpus: ranks, in nodes of `GPUS_PER_NODE`.
        offload: stage 3 with optimizer states and weights on the CPU.
    """
    use_accelerator()
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    per_node, nodes = min(gpus, GPUS_PER_NODE), -(-gpus // GPUS_PER_NODE)
    if stage == 3:
        cpu, gpu, _ = estimate_zero3_model_states_mem_needs(
            total, largest, per_node, nodes, cpu_offload=offload, cpu_offload_params=offload, zero_init=False
        )
        return gpu, cpu
    cpu, gpu = estimate_zero2_model_states_mem_needs(total, per_node, nodes, cpu_offload=False)
    if stage < 2:
        gpu = 4 * total + 16 * total // (gpus if stage == 1 else 1)
    return gpu, cpu


def activation_bytes(model: VariantLMHeadModel, micro_batch: int, block_size: int, checkpointing: bool) -> int:
    """Bytes of activations at the peak of a training step in bf16, on one GPU, without torch.compile.

    What autograd keeps is counted, on fake tensors, for one sequence of `block_size` tokens through `model`'s class,
    every block of it; a fused attention keeps no attention matrix. With `checkpointing` that is the input of each
    block, and one block is recomputed at a time. To it comes the loss: one chunk of its
    logits, and the head's gradient.
    """
    kept = saved_bytes(model, block_size, checkpointing)
    if checkpointing:
        kept += saved_bytes(model, block_size, checkpointing=False) // model.config.n_layer
    rows = micro_batch * model.positions(block_size)
    per_token = BYTES_PER_LOGIT * min(rows, CHUNK_ROWS["cuda"]) + BYTES_PER_WEIGHT * model.config.n_embd
    return micro_batch * kept + per_token * model.config.vocab_size


@functools.cache
def saved_bytes(model: VariantLMHeadModel, block_size: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps in bf16 for each sequence of `block_size` tokens through a model like `model`.

    For GPT-2 Medium some 6 % more than on a GPU: the mask that transformers makes for fake tensors only, and a CPU's
    dropout, which keeps 2 bytes an entry where CUDA's keeps 1.
    """
    config = copy.deepcopy(model.config)
    backend = "eager" if config._attn_implementation == "eager" else "sdpa"
    if backend == "sdpa":
        config.attn_pdrop = 0.0  # on a GPU a fused attention keeps the seed of its dropout; on a CPU it is not fused
    with FakeTensorMode():
        twin = type(model)._from_config(config, dtype=torch.bfloat16, attn_implementation=backend).train()
        if checkpointing:
            recompute_blocks(twin)
        return _kept_by_autograd(twin, 2, block_size) - _kept_by_autograd(twin, 1, block_size)  # weights and masks: 0


def _kept_by_autograd(model: VariantLMHeadModel, batch: int, block_size: int) -> int:
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(batch, block_size, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, skip_logits=True)
    return sum(storage.nbytes() for storage in kept.values())
