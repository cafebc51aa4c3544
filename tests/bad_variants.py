"""Variants that break a promise on purpose: name -> the promise, words of the finding, and the file's own part.

The part stands in place of the attention of the page's first example, as in `variant_examples`.
"""

ATTENTION = """
class Bad(VariantAttention):
    def attend(self, query, key, value, attention_mask, **kwargs):
        mixed, weights = super().attend(query, key, value, attention_mask, **kwargs)
        {code}
        return mixed, weights
# IdeaModel: attention_class = Bad
"""

BLOCK = """
from transformers.models.gpt2.modeling_gpt2 import GPT2Block


class Bad(GPT2Block):
    def forward(self, hidden_states, *args, **kwargs):
        out = super().forward(hidden_states, *args, **kwargs)
        {code}
        return out
# IdeaModel: block_class = Bad
"""

WITHOUT_MASK = """
class Bad(VariantAttention):
    def attend(self, query, key, value, attention_mask, **kwargs):
        return super().attend(query, key, value, None, **kwargs)
# IdeaModel: attention_class = Bad
"""

STREAM = """
class Bad(VariantLMHeadModel):
    def streams_of(self, outputs, labels, attention_mask=None, shift_labels=None):
        hidden = outputs.last_hidden_state
        return {code}
# IdeaLMHeadModel: (Bad)
"""


def attention(code: str) -> str:
    """An attention whose output (B, S, H, D), `mixed`, is changed."""
    return ATTENTION.format(code=code)


def block(code: str) -> str:
    """A block whose output (B, S, E), `out`, is changed."""
    return BLOCK.format(code=code)


BAD: dict[str, tuple[str, str, str]] = {
    "long_leak": (
        "no-leak-by-gradient",
        r"the prediction of token \d+ depends on token \d{3,}, in evaluation mode",
        attention("mixed = mixed + 0.01 * (value[:, :, 400:].mean(2)[:, None] if value.shape[2] > 400 else 0)"),
    ),
    "leak_in_training": (
        "no-leak-by-gradient",
        r"the prediction of token \d+ depends on token \d+, in training mode",
        block("out = out + 0.01 * out.mean(1, keepdim=True) if self.training else out"),
    ),
    "leak_in_bf16": (
        "no-leak-by-gradient",
        r"the prediction of token \d+ depends on token \d+, in bf16",
        block("out = out + out.mean(1, keepdim=True) if out.dtype == torch.bfloat16 else out"),
    ),
    "leak_in_the_last_layer": (
        "no-leak-by-gradient",
        r"depends on token",
        attention("mixed = mixed + mixed.mean(1, keepdim=True) if self.layer_idx == 11 else mixed"),
    ),
    "sequence_norm": (
        "no-leak-by-gradient",
        r"depends on token",
        """
class SequenceNorm(nn.LayerNorm):
    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(1, keepdim=True))
# IdeaModel: norm_class = SequenceNorm
""",
    ),
    "leak_without_gradient": (
        "no-leak-by-change",
        r"the prediction of token \d+ changes with token \d+",
        block("out = out * (1 + 1e-3 * out.detach()[:, -1:].sign())"),
    ),
    "looks_two_back": (
        "sees-its-past",
        r"the prediction of token \d+ does not depend on token \d+",
        """
class TwoBack(nn.Embedding):
    def forward(self, ids):
        found = super().forward(ids)
        return torch.cat([torch.zeros_like(found[:, :1]), found[:, :-1]], dim=1)
# IdeaModel: embedding_class = TwoBack
""",
    ),
    "batch_mean": (
        "rows-apart",
        r"the predictions of one text depend on token \d+ of another one in the same batch",
        block("out = out + 0.1 * (out.mean(0, keepdim=True) - out)"),
    ),
    "batch_norm_in_training": (
        "rows-apart",
        r"of another one in the same batch, in training mode",
        block("out = out - out.mean(0, keepdim=True) if self.training and len(out) > 1 else out"),
    ),
    "padding_seen": (
        "padding-unseen",
        r"what stands in the padding on the left changes the logits",
        WITHOUT_MASK,
    ),
    "packing_seen": (
        "packed-apart",
        r"a text packed behind another one has other logits, by \S+, from its token \d+ on",
        WITHOUT_MASK,
    ),
    "shifted_twice": (
        "labels-shifted-once",
        r"against the token 2 places on; 1 is right",
        STREAM.format(code='{"next_token": (hidden[:, :-2], labels[:, 2:])}'),
    ),
    "copies_its_input": (
        "labels-shifted-once",
        r"against the token 0 places on; 1 is right",
        STREAM.format(code='{"next_token": (hidden, labels)}'),
    ),
    "random_is_learned": (
        "random-stays-random",
        r"tokens drawn at random, 16 of them, are predicted with a loss of [\d.]+ nats",
        STREAM.format(code='{"next_token": (hidden, labels)}'),
    ),
    "mean_of_its_own": (
        "part-of-a-batch",
        r"num_items_in_batch=10 gives a loss of",
        """
class Bad(VariantLMHeadModel):
    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)
# IdeaLMHeadModel: (Bad)
""",
    ),
    "mean_of_its_parts": (
        "trainer",
        r"in 4 parts of 2 rows transformers' Trainer logs a loss of",
        """
class Bad(VariantLMHeadModel):
    def forward(self, input_ids=None, labels=None, num_items_in_batch=None, **kwargs):
        return super().forward(input_ids, labels=labels, **kwargs)
# IdeaLMHeadModel: (Bad)
""",
    ),
    "forgetful_cache": (
        "cache",
        r"the logits at token \d+ are others with a cache than without",
        """
class Bad(VariantAttention):
    def remember(self, key, value, cache, **kwargs):
        key, value = super().remember(key, value, cache, **kwargs)
        kept = torch.arange(value.shape[2]) >= value.shape[2] - 300
        return key, value * kept[:, None]
# IdeaModel: attention_class = Bad
""",
    ),
    "generates_without_mask": (
        "generation",
        r"behind padding on the left another text is generated|goes another way",
        """
class Bad(VariantLMHeadModel):
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {**inputs, "attention_mask": None, "position_ids": None}
# IdeaLMHeadModel: (Bad)
""",
    ),
    "noise_in_evaluation": (
        "evaluation-repeats",
        r"two evaluations of the same text differ",
        block("out = out + 1e-3 * torch.randn_like(out)"),
    ),
    "moves_in_training": (
        "evaluation-repeats",
        r"an evaluation after a forward pass of training, without any step, differs",
        """
from transformers.models.gpt2.modeling_gpt2 import GPT2Block


class Bad(GPT2Block):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        self.register_buffer("seen", torch.ones(1))

    def forward(self, hidden_states, *args, **kwargs):
        if self.training:
            self.seen.mul_(0.9)
        return super().forward(hidden_states, *args, **kwargs) * self.seen
# IdeaModel: block_class = Bad
""",
    ),
    "starts_sure": (
        "starts-uniform",
        r"the loss of the untrained model is",
        """
class Bad(nn.Linear):
    def forward(self, hidden):
        return 40 * super().forward(hidden)
# IdeaLMHeadModel: head_class = Bad
""",
    ),
    "bf16_positions": (
        "bf16",
        r"in bf16 the logits .* are off by",
        """
class Bad(VariantAttention):
    def place(self, query, key, first_slot):
        slots = torch.arange(query.shape[2], dtype=query.dtype) + first_slot
        return torch.cat([query, torch.ones_like(query)], -1), torch.cat(
            [key, 20 * (slots * 0.7).sin()[:, None].expand_as(key)], -1
        )
# IdeaModel: attention_class = Bad
""",
    ),
    "unused_parameter": (
        "parameters-learn",
        r"unused gets no gradient",
        """
class Bad(VariantAttention):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        self.unused = nn.Parameter(torch.zeros(3))
# IdeaModel: attention_class = Bad
""",
    ),
    "detached": (
        "parameters-learn",
        r"gets no gradient|is zero everywhere",
        attention("mixed = mixed.detach()"),
    ),
    "buffer_not_saved": (
        "saved-whole",
        r"the logits of the saved model are others once it is loaded, by .*: the buffer .*scale is not saved",
        """
class Bad(VariantAttention):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        self.register_buffer("scale", torch.rand(self.num_heads), persistent=False)

    def place(self, query, key, first_slot):
        return query * (1 + self.scale[:, None, None]), key
# IdeaModel: attention_class = Bad
""",
    ),
    "counts_its_passes": (
        "checkpointing",
        r"with gradient checkpointing",
        """
from transformers.models.gpt2.modeling_gpt2 import GPT2Block


class Bad(GPT2Block):
    passes = 0

    def forward(self, hidden_states, *args, **kwargs):
        self.passes += 1
        return super().forward(hidden_states, *args, **kwargs) * (1 + 0.5 * (self.passes % 2))
# IdeaModel: block_class = Bad
""",
    ),
    "graph_break": (
        "compile",
        r"torch.compile stops",
        block("out = out * (1 if out.sum().item() > 1e9 else 1)"),
    ),
    "twice_the_work": (
        "flops",
        r"training FLOPs per token are \S+ by the formula, \S+ as counted",
        block("out = out + 0.1 * (self.ln_2(out) @ self.mlp.c_fc.weight @ self.mlp.c_proj.weight)"),
    ),
    "reads_a_file": (
        "export",
        r"its export does not load without this package",
        """
from pathlib import Path
STEP = float(Path(__file__).with_name("step.txt").read_text())


class Bad(VariantAttention):
    def place(self, query, key, first_slot):
        return query * STEP, key
# IdeaModel: attention_class = Bad
""",
    ),
    "reads_its_shards": (
        "zero",
        r"at ZeRO stage 3 the loss of step \d is",
        attention("mixed = mixed * (1 + 3 * (next(self.c_proj.parameters()).numel() > 0))"),
    ),
}
