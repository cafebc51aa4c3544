"""GPT-2's transformer of `transformers`, whose parts a variant replaces by classes of its own."""

from collections.abc import Callable

from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model, GPT2PreTrainedModel

from .variant_attention import VariantAttention


class ScaledInit(GPT2PreTrainedModel):
    """GPT-2's initialisation, also where transformers would leave out a part of it."""

    config_class: type[GPT2Config]

    def _initialize_weights(self, module: nn.Module, *_) -> None:
        # transformers takes classes outside its own package for code that does not know its init flags, and then skips
        # modules without parameters of their own: GPT2Attention and GPT2MLP, whose turn is c_proj's 0.02 / sqrt(2 L).
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (reset := getattr(module, "reset_own_parameters", None)) is not None:
            reset()


class VariantModel(ScaledInit, GPT2Model):
    """`GPT2Model` with the parts replaced for which a class is given (None: GPT-2's own).

    A part that has a method `reset_own_parameters` is initialised by it, after GPT-2's way; by
    `transformers.initialization`, whose functions leave alone what was loaded.

    Attributes:
        block_class: made as `block_class(config, layer_idx=i)`; a subclass of `GPT2Block`.
        attention_class: of the blocks; made as `attention_class(config, layer_idx=i)`.
        mlp_class: of the blocks; made as `mlp_class(inner_size, config)`.
        norm_class: of both norms of each block and the last one; made as `norm_class(n_embd, eps=...)`.
        position_class: of `wpe`; made as `position_class(n_positions, n_embd)`, and called with position ids (B, S).
        embedding_class: of `wte`; made as `embedding_class(vocab_size, n_embd)`; its `weight` (V, E) is the head's.
    """

    block_class: type[GPT2Block] | None = None
    attention_class: type[VariantAttention] | None = None
    mlp_class: Callable[..., nn.Module] | None = None
    norm_class: Callable[..., nn.Module] | None = None
    position_class: Callable[..., nn.Module] | None = None
    embedding_class: Callable[..., nn.Module] | None = None

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        if self.embedding_class is not None:
            self.wte = self.embedding_class(config.vocab_size, config.n_embd)  # type: ignore[assignment]
        if self.position_class is not None:
            self.wpe = self.position_class(config.n_positions, config.n_embd)  # type: ignore[assignment]
        if self.norm_class is not None:
            self.ln_f = self.norm_class(config.n_embd, eps=config.layer_norm_epsilon)  # type: ignore[assignment]
        for layer_idx in range(len(self.h)):
            if self.block_class is not None:
                self.h[layer_idx] = self.block_class(config, layer_idx=layer_idx)
            self._replace_parts(self.h[layer_idx], layer_idx)
        own = (self.block_class, self.attention_class, self.mlp_class, self.norm_class)
        if any(part is not None for part in (*own, self.position_class, self.embedding_class)):
            self.post_init()  # initialises what was replaced

    def _replace_parts(self, block: nn.Module, layer_idx: int) -> None:
        config = self.config
        if self.attention_class is not None:
            block.attn = self.attention_class(config, layer_idx=layer_idx)
        if self.mlp_class is not None:
            block.mlp = self.mlp_class(config.n_inner if config.n_inner is not None else 4 * config.n_embd, config)
        if self.norm_class is not None:
            for name in ("ln_1", "ln_2"):
                if hasattr(block, name):  # a block of the variant's own may have one norm
                    setattr(block, name, self.norm_class(config.n_embd, eps=config.layer_norm_epsilon))
