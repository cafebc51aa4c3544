"""What was not asked for is filled in: by the run that is gone on with, by the preset, by the data."""

from dataclasses import replace

from ..data import Data, DataError, load
from ..faults import UsageError
from ..nvidia import unused_gpu
from ..ranks import has_cuda
from .deepspeed_json import find_ds_config, stated_options
from .options import Options, option_fields
from .presets import OF_ITS_SIZE, PRESETS


def resolve(options: Options) -> Options:
    """Return `options` with what the preset says filled in.

    An explicit option wins over the preset; so does a value of an explicit JSON.

    Raises:
        UsageError: the preset is to be chosen, and there is a GPU that torch cannot use.
    """
    preset, chosen = options.preset, []
    if preset == "auto":
        if told := unused_gpu():
            raise UsageError([f"--preset auto: {told}; or say --preset demo, for a tiny model on the CPU"])
        preset = "seed" if has_cuda() else "demo"
        chosen = [f"preset={preset}"]
    base = dict(PRESETS[preset])
    if options.deepspeed_config is not None:
        try:
            stated = stated_options(find_ds_config(options)[1])
        except UsageError:
            stated = set()  # told by the checks
        base = {k: v for k, v in base.items() if k not in stated}
    if options.init_from is not None or options.size not in (None, base["size"]):
        base = {k: v for k, v in base.items() if k not in OF_ITS_SIZE}
    filled = {k: v for k, v in base.items() if k != "model_args" and getattr(options, k) is None}
    # Asking for one of two ways to say a thing replaces the preset's other way.
    if options.max_steps is None and options.num_train_epochs is not None:
        filled.pop("max_steps", None)
    if options.train_batch_size is None and options.per_device_train_batch_size is not None:
        filled.pop("train_batch_size", None)
    if options.warmup_steps is not None:
        filled.pop("warmup_ratio", None)
    if options.init_from is not None:
        filled.pop("size", None)
        if options.tokenizer is None:
            filled["tokenizer"] = options.init_from
    if options.block_size is None:
        filled.setdefault("block_size", options.spec.block_size)
    own_fields = {k: v for k, v in base.get("model_args", {}).items() if k not in (options.model_args or {})}
    filled["chosen"] = (*chosen, *(f"{k}={v}" for k, v in {**filled, **own_fields}.items()))
    if not options.asked:  # made by a program, not by the command line
        filled["asked"] = {f.name: value for f in option_fields() if (value := getattr(options, f.name)) != f.default}
    filled["model_args"] = {**base.get("model_args", {}), **(options.model_args or {})}
    filled["output_dir"] = options.output_dir or f"runs/{options.spec.name}"
    return replace(options, preset=preset, **filled)


def load_data(options: Options) -> Data:
    """Return the data that resolved options name. Raises `UsageError`."""
    try:
        return load(options.dataset, options.tokenizer, options.block_size, reading=options.reading)
    except DataError as err:
        raise UsageError([str(err)]) from err
