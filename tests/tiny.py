"""Tiny random models of several architectures, and a tokenizer for them, made on the spot."""

import importlib

import mlx.core as mx

COMMON = dict(
    hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, vocab_size=97, rope_theta=10000.0,
)  # fmt: skip
ARCHITECTURES = {
    "qwen2": dict(tie_word_embeddings=True),
    "llama": dict(tie_word_embeddings=False),
    "qwen3": dict(tie_word_embeddings=True, head_dim=8, max_position_embeddings=512),
    "gemma2": dict(head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "gemma3_text": dict(head_dim=8, sliding_window=6, sliding_window_pattern=2, query_pre_attn_scalar=8),
    "mamba2": dict(
        num_heads=4, head_dim=16, state_size=8, n_groups=1, conv_kernel=4, expand=2, use_bias=False, use_conv_bias=True,
        tie_word_embeddings=True, time_step_limit=(0.0, 100.0), time_step_rank=4, layer_norm_epsilon=1e-5,
    ),
    "lfm2": dict(  # short convolutions and attention
        norm_eps=1e-5, conv_bias=True, conv_L_cache=3, block_dim=32, block_ff_dim=64, block_multiple_of=8,
        block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"], max_position_embeddings=512,
    ),
    "qwen3_5": dict(  # gated delta states and attention
        text_config=dict(
            COMMON, model_type="qwen3_5_text", full_attention_interval=2, head_dim=8,
            tie_word_embeddings=True, linear_num_value_heads=4, linear_num_key_heads=2,
            linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4,
        ),
    ),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0, **changes):
    """A random model of mlx-lm's architecture `name`, sharp enough that its samples are not all alike."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **COMMON, **ARCHITECTURES[name], **changes}))
    weights = [(k, v * 3 if v.ndim > 1 else v) for k, v in __import__("mlx.utils").utils.tree_flatten(model.parameters())]
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


class LetterTokenizer:
    """Ids 0..96 are characters from "!" on; 96 ends a text."""

    eos_token_ids = {96}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(33 + i) for i in ids if not (skip_special_tokens and i in self.eos_token_ids))


# The parts of a rollout, a list of Completion, as lists.


def ids_of(rollout) -> list[list[int]]:
    return [completion.ids for completion in rollout]


def logps_of(rollout) -> list[list[float]]:
    return [completion.sampler_logps for completion in rollout]


def reasons_of(rollout) -> list[str]:
    return [completion.finish_reason for completion in rollout]


def texts_of(rollout) -> list[str]:
    return [completion.text for completion in rollout]
