"""What a run would be, said before it starts: steps, tokens, parameters, FLOPs, DeepSpeed config, memory per GPU."""

import json

import torch

from .metrics import flops_per_token
from .registry import GPT2_VOCABULARY
from .run import Run, load_data, plan, world_size

# `variants.md`, "The data, exactly": 114,003 blocks of 1024 tokens.
WIKITEXT_TOKENS = 116_739_072
GIB = 1024**3


def describe(run: Run) -> str:
    """The resolved `run` as text. Reads the data, except WikiText-103, whose size is known. Raises `Faults`."""
    if run.dataset == "wikitext-103":
        blocks, vocabulary = WIKITEXT_TOKENS // run.block_size, GPT2_VOCABULARY
        data_line = f"wikitext-103: about {blocks:,} blocks of {run.block_size} (not read for a dry run)"
    else:
        data = load_data(run)
        blocks, vocabulary, data_line = len(data.train), data.vocab_size, data.description
    config = run.make_config(vocabulary)
    with torch.device("meta"):
        model = run.spec.model_class(config)
    steps, ds_config = plan(run, blocks)
    batch = ds_config["train_batch_size"]
    parameters = model.num_parameters()
    positions = model.positions(run.block_size)
    flops = flops_per_token(parameters, config.n_layer, config.n_embd, run.block_size, positions)
    micro = ds_config["train_micro_batch_size_per_gpu"]
    warmup = ds_config.get("scheduler", {}).get("params", {}).get("warmup_num_steps", 0)
    accumulation = ds_config["gradient_accumulation_steps"]
    memory = {
        gpus: memory_per_gpu(parameters, config, ds_config, positions, gpus, run.gradient_checkpointing) / GIB
        for gpus in (1, 2, 8, 64)
        if batch % gpus == 0
    }
    lines = [
        f"variant            {run.variant}: {run.spec.summary}",
        f"data               {data_line}",
        f"parameters         {parameters:,}",
        f"steps              {steps:,} of {batch} x {run.block_size} tokens, {warmup:,} of them warm-up",
        f"training tokens    {steps * batch * run.block_size:,}",
        f"FLOPs per token    {flops:.4g} (6N + 12LES per position, {positions} positions a sequence)",
        f"FLOPs in all       {flops * steps * batch * run.block_size:.4g}",
        f"batch              {batch} = {micro} per GPU x {accumulation} accumulated x {world_size()} GPUs",
        "memory per GPU     " + ", ".join(f"{n} GPUs: {gib:.1f} GiB" for n, gib in memory.items()) + " (estimate)",
        "DeepSpeed config",
        json.dumps(ds_config, indent=2),
    ]
    return "\n".join(lines)


def memory_per_gpu(parameters: int, config, ds_config: dict, positions: int, world: int, checkpointing: bool) -> float:
    """An estimate in bytes, at a global batch split over `world` GPUs without accumulation beyond the config's.

    Model states: 16 bytes a parameter, of which ZeRO stage 1 shares out 12, stage 2 14, stage 3 all (Rajbhandari et
    al., 2020, section 3). Activations: 34 bytes a position, channel and layer without the attention matrix, 2 where the
    blocks are recomputed (Korthikanti et al., 2022, section 4).
    """
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    shared = {0: 0, 1: 12, 2: 14, 3: 16}[stage]
    states = parameters * (16 - shared + shared / world)
    micro = max(ds_config["train_batch_size"] // (world * ds_config["gradient_accumulation_steps"]), 1)
    per_layer = micro * positions * config.n_embd
    layers = 2 * per_layer * config.n_layer + 34 * per_layer if checkpointing else 34 * per_layer * config.n_layer
    return states + layers
