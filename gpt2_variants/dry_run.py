"""What a run would be, said before it starts: steps, tokens, parameters, FLOPs, DeepSpeed config, memory per GPU."""

import json

from .config.options import Options
from .config.plan import DataFacts, Plan, facts_of, make_plan
from .config.resolve import load_data
from .measuring import peak_flops
from .memory import GIB, Card, Demand, NoEstimate, card, verdict, with_fitting_micro_batch
from .memory.states import GPUS_PER_NODE
from .models.modeling_base import VariantLMHeadModel
from .ranks import has_cuda, world_size
from .registry import GPT2_VOCABULARY
from .words import counted

# WikiText-103 as the published runs cut it: 114,003 blocks of 1024 tokens.
WIKITEXT_TOKENS = 116_739_072
NUMBERS_OF_GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)

ASSUMED_MFU = 0.4  # of the time that a run would take; no GPU has been measured


def describe(options: Options) -> str:
    """Return what `options` ask for, as text.

    It reads the data, but for WikiText-103, whose size is known. It raises `UsageError`.
    """
    if options.dataset == "wikitext-103":
        blocks, vocabulary = WIKITEXT_TOKENS // options.block_size, GPT2_VOCABULARY
        description = f"wikitext-103: about {blocks:,} blocks of {options.block_size} (not read for a dry run)"
        facts = DataFacts(blocks, None, description, None)
    else:
        data = load_data(options)
        facts, vocabulary = facts_of(data), data.vocab_size
    config = options.make_config(vocabulary)
    plan = make_plan(options, facts, config, world_size())
    model = plan.spec.on_meta(plan.model_config())
    compiled = _compiles_on_cuda(options, plan)
    gpu, said = card(), []
    if options.auto_micro_batch:
        options, line = with_fitting_micro_batch(options, Demand(plan, model, compiled), gpu)
        plan = make_plan(options, facts, config, world_size())
        said = [line]
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
        f"{plan.gradient_accumulation_steps} accumulated x {counted(plan.world_size, 'GPU')}",
        f"optimizer          {plan.optimizer['type']}, learning rate {rate}, weight decay {plan.weight_decay:g}, "
        f"clipping {plan.gradient_clipping:g}" + (f" ({settings})" if settings else ""),
        f"schedule           {plan.schedule['type']}",
        f"precision          {plan.precision}",
        f"chosen for you     {', '.join(plan.chosen) or 'nothing'}",
        *memory_lines(plan, model, compiled, gpu),
        *said,
        "DeepSpeed config",
        json.dumps(plan.ds_config, indent=2),
    ]
    return "\n".join(lines)


def _compiles_on_cuda(options: Options, plan: Plan) -> bool:
    """Return whether the run would be compiled on a GPU, where it would be without one too or by default."""
    return plan.compile or (options.compile is None and not has_cuda() and plan.zero_stage < 3)


def memory_lines(plan: Plan, model: VariantLMHeadModel, compiled: bool, gpu: Card) -> list[str]:
    """Return what a run takes of each GPU by estimate, as lines of text: a table, this run, and whether it fits."""
    demand = Demand(plan, model, compiled)
    try:
        lines = memory_table(demand)
        other = demand.uncompiled if compiled else Demand(plan, model, compiled=True)
        peaks = {d.compiled: d.peak(plan.per_device_train_batch_size) / GIB for d in (demand, other)}
    except NoEstimate as err:
        return [f"memory             no estimate: {err}"]
    return [
        *lines,
        f"{'':19}this run, per GPU of {plan.world_size}: {peaks[True]:.1f} with torch.compile, "
        f"{peaks[False]:.1f} without",
        verdict(demand, gpu).line.replace("memory: ", f"{'fits':19}", 1),
        *_hours(plan, gpu),
    ]


def _hours(plan: Plan, gpu: Card) -> list[str]:
    """Return how long the run takes on the GPU at hand, where its peak is known."""
    peak = peak_flops(gpu.name) if gpu.here else None
    if peak is None:
        return []
    flops = plan.flops_per_token * plan.total_steps * plan.train_batch_size * plan.block_size
    hours = flops / (ASSUMED_MFU * peak * plan.world_size) / 3600
    return [
        f"time               {hours:.1f} hours on {plan.world_size} x {gpu.name} if it reaches {ASSUMED_MFU:.0%} of "
        f"{peak / 1e12:.0f} TFLOP/s, which is assumed, not measured"
    ]


def memory_table(demand: Demand) -> list[str]:
    """Estimated memory for 1 to 1,024 GPUs and every ZeRO stage, as lines of text; the run's own stage is marked.

    Raises:
        NoEstimate: the model cannot be run without data.
    """
    plan = demand.plan
    own = "offload" if plan.offload else f"ZeRO {plan.zero_stage}" if plan.zero_stage else "no ZeRO"
    choices = {f"ZeRO {stage}": (stage, False) for stage in (1, 2, 3)} | {"offload": (3, True)}
    if own == "no ZeRO":
        choices = {own: (0, False), **choices}
    heads = [f"{name}*" if name == own else name for name in choices]
    compiled = "with" if demand.compiled else "without"
    lines = [
        f"memory             estimate in GiB per GPU, in {plan.precision}, {compiled} torch.compile: activations; the",
        "                   peak of all by ZeRO stage (* this run's), without what CUDA and NCCL take. Nodes of "
        f"{GPUS_PER_NODE} GPUs",
        f"{'':19}{'GPUs':>5} {'sequences':>9} {'activations':>11}"
        + "".join(f"{h:>9}" for h in heads)
        + f"{'CPU of a node, offload':>24}",
    ]
    batch, accumulation = plan.train_batch_size, plan.gradient_accumulation_steps
    for gpus in NUMBERS_OF_GPUS:
        micro = max(batch // (gpus * accumulation), 1)
        shared = {name: demand.sharding(gpus, *choice) for name, choice in choices.items()}
        lines.append(
            f"{'':19}{gpus:>5,} {micro:>9} {demand.activations(micro) / GIB:>11.1f}"
            + "".join(f"{demand.peak(micro, sharding) / GIB:>9.1f}" for sharding in shared.values())
            + f"{demand.states(shared['offload']).cpu / GIB:>24.1f}"
        )
    if batch < NUMBERS_OF_GPUS[-1]:
        lines.append(
            f"                   beyond {counted(batch, 'GPU')} with --train_batch_size of a multiple of their number"
        )
    return lines
