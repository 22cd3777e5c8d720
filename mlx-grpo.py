#!/usr/bin/env python3
"""Group Relative Policy Optimization for small language models, on MLX: Metal, CUDA or CPU.

For every prompt q the policy writes G completions o_1..o_G, reward functions score them, and each completion
is pushed up or down by how it compares with its own group (DeepSeekMath, arXiv 2402.03300, eqs. 3 and 4):

    A_i  = (R_i - mean(R)) / std(R)
    loss = - 1/G sum_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1-eps, 1+eps) A_i) - beta KL_it ]
    r_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)

There is no value network and no reward model: rewards are plain Python functions, the baseline is the group's
mean.

    uv run mlx-grpo.py                                      the quickstart: a bundled model, about a minute
    uv run mlx-grpo.py --config configs/prod.toml --set learning_rate=2e-6
    uv run mlx-grpo.py --config configs/prod.toml --resume  carry on after a stop

The file reads in the order data flows: config, tokenizer, prompts, model, data, answers, rewards, rollout,
objective, log-probs, optimizer, evaluation, update, trainer, command line. It uses the package mlx_grpo:

    mlx_grpo/            reads settings, models, datasets and numbers; calls the reward functions
    mlx_grpo/rollout/    KV caches, decoding, how hard each prompt has been
    mlx_grpo/update/     micro-batches, the head in chunks, adapters
    mlx_grpo/backends/   what differs by hardware
    mlx_grpo/run/        directory, checkpoints, memory plan, ranks, terminal, trackers, whether a run learns

Left out on purpose: a value network, a reward model, a second process that samples.

    B prompts a batch   G completions a prompt   N = B*G rows   P prompt positions   T completion positions
    V vocabulary        D hidden width           logps, old_logps, ref_logps, sampler_logps (N, T), in nats
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from mlx_grpo.backends import use_fast_backend

if __name__ == "__main__":
    use_fast_backend()  # before MLX is imported: it uses the BLAS that is loaded first

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_grpo.update.compiled_shapes import CompiledShapes, compiling_pays, note_shapes
from mlx_grpo.update.adapters import adapter_layers, fused, reference_copy
from mlx_grpo.answers import (
    after_thinking, cut_while_thinking, last_boxed, last_number, last_quantity,
    parse_number, read_quantity, same_answer, unwrapped,
)  # fmt: skip
from mlx_grpo.chat_templates import (
    encode_chat, special_tokens, system_in_first_user_message, without_special_tokens,
)  # fmt: skip
from mlx_grpo.update.micro_batches import grid, left_pad, micro_batches
from mlx_grpo.update import shared_prompts
from mlx_grpo.update.shared_prompts import reason_not_to_share
from mlx_grpo.backends.blas import blas_name
from mlx_grpo.backends.device import compile_works, memory_bytes, on_cpu, on_cuda
from mlx_grpo.backends.cuda_decoding import FAST_AFTER, fast_decoder
from mlx_grpo.rollout.decoding import Decoder, Row, decode
from mlx_grpo.rollout.difficulty import lately, outcome, remembered
from mlx_grpo.update.fused_head import HEAD_CHUNK_LOGITS, make_head_stats, softmax, split_head
from mlx_grpo.rollout.kv_cache import cache_bytes, can_pad, checkpointed
from mlx_grpo.backends.precision import keep_exact, narrowed, widen, with_masters, without_masters
from mlx_grpo.backends.streams import evaluate_by_turns, stream_count, streams_of_cores, run_on_streams
from mlx_grpo.loading import (
    ROOT, DataRow, adapter_base, field_of, is_adapter_alone, is_quantized, local_path, open_dataset,
    prompt_key, read_chat, read_model_config, resolve_model, warn_of_rows,
)  # fmt: skip
from mlx_grpo.run.learning_signal import CHECKED_PROMPTS, SignalWatch, nothing_learnt, why_stop
from mlx_grpo.run.memory_plan import LESS_MEMORY, Work, print_plan, suggestions, work_of
from mlx_grpo.run.records import completion_records, machine_facts, time_facts, update_facts
from mlx_grpo.run.ways import compiled_shapes, plan_lines
from mlx_grpo.run.terminal import Monitor, print_outcome, stopping_on_signals, write_report
from mlx_grpo.run.trackers import check_trackers, start_trackers
from mlx_grpo.run.distributed import ALONE, Ranks, digest, start_ranks
from mlx_grpo.run.checkpoints import (
    Checkpoints, Snapshot, changed_inputs, changed_settings, not_resumable, read_snapshot, write_snapshot,
)  # fmt: skip
from mlx_grpo.errors import RunError, UserError
from mlx_grpo.export import ModelWriter
from mlx_grpo.run.directory import (
    RunLogs, choose_run_dir, file_digest, find_checkpoint, lock_directory, write_directory,
)  # fmt: skip
from mlx_grpo.scoring import load_rewards, names_of, reward_files, score
from mlx_grpo.settings import (
    CHOICES, SEQUENCE_CORRECTIONS, check_config, config_as_toml, read_settings, settings_record,
)  # fmt: skip
from mlx_grpo.tokenizer_pickle import read_tokenizer_pickle
from mlx_grpo.update.swiglu import use_swiglu

SYSTEM_PROMPT = (
    "Think step by step between <reasoning> and </reasoning>, "
    "then write only the final number between <answer> and </answer>."
)


# A line of a prompt template with at most this many characters is a label, such as "### Instruction:".
LONGEST_LABEL = 32


# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MLXGRPOConfig:
    """Every setting of a run and its only default, by TRL's name where TRL has it, or else by mlx-lm's."""

    # Model
    model_name: str = "Qwen/Qwen2.5-1.5B-Instruct"  # a local MLX or Hugging Face directory, or a hub name
    trust_remote_code: bool = False  # run Python code that comes with the model; only for authors you trust
    fine_tune_type: str = "auto"  # full, lora or dora; auto is full, or lora where the model is quantised
    num_layers: int = -1  # adapters go on this many last blocks; -1 for all
    lora_parameters: dict = field(
        default_factory=lambda: {"rank": 8, "scale": 20.0, "dropout": 0.0}
    )  # as in mlx-lm
    # Data
    dataset: str = "openai/gsm8k"  # hub name, or local file or folder (train.* and test.* are its splits)
    dataset_config: str = "main"  # the hub dataset's configuration; not used for local files
    eval_dataset: str = ""  # held-out data of its own; empty: the dataset's test split
    eval_fraction: float = 0.05  # share of the training rows set aside where there is no test split
    prompt_field: str = "question"  # column with the question: text, or a list of chat messages
    answer_field: str = "answer"  # column with the gold answer; what follows #### counts where there is one
    max_train_samples: int = 0  # use the first so many training rows, 0 for all; the schedule counts them
    max_prompt_length: int = 512  # tokens; longer prompts are dropped before training and counted
    system_prompt: str = SYSTEM_PROMPT  # what tells the model the answer's form; empty for none
    completion_prefix: str = ""  # text that starts every answer, such as "<reasoning>\n"; scored with it
    prompt_template: str = ""  # a base model's, in place of a chat template: "Question: {prompt}\nAnswer:"
    chat_template_kwargs: dict = field(default_factory=dict)  # template values: { enable_thinking = false }
    easy_prompt_weight: float = 1.0  # chance to draw a prompt whose completions were all right lately
    hard_prompt_weight: float = 1.0  # and one whose completions were all wrong; 1 draws every prompt alike
    difficulty_window: int = 1  # lately: the last so many times that the prompt was drawn
    # Rewards
    reward_funcs: list[str] = field(
        default_factory=lambda: [
            "correctness_reward_func",
            "int_reward_func",
            "strict_format_reward_func",
            "soft_format_reward_func",
            "xmlcount_reward_func",
        ]
    )  # built-in names, or "file.py:function" for your own
    reward_weights: list[float] = field(default_factory=list)  # one per function; empty for 1.0 each
    multi_objective_aggregation: str = "sum_then_normalize"  # or normalize_then_sum: each function by group
    reward_timeout: float = 60.0  # seconds one reward function may take for one batch
    # Rollout
    batch_size: int = 8  # prompts a step
    num_generations: int = 8  # G, completions a prompt; the baseline is their mean
    max_completion_length: int = 512  # tokens; also the constant that dr_grpo divides by
    max_new_tokens: int = 0  # a lower limit for the rollout alone; 0 for max_completion_length
    temperature: float = 1.0  # of sampling, and of the log-probs in the objective
    top_p: float = 1.0  # below 1 the sampled distribution is not the policy's: corrected, with a warning
    top_k: int = 0  # above 0: the same
    min_p: float = 0.0  # above 0: the same
    repetition_penalty: float = 1.0  # other than 1: the same
    stop_strings: list[str] = field(
        default_factory=lambda: ["</answer>"]
    )  # ends a completion, and is kept; unless set, a next prompt's first words too with prompt_template
    memory_limit_gb: float = 0.0  # device memory above which MLX waits for queued work; 0: half of it
    kv_budget_gb: float = 0.0  # KV cache the rollout may fill; above it, several batches; 0: 1/4 of memory
    quantize_for_rollouts: bool = False  # sample from a quantised copy, corrected: for GPUs, slower on a CPU
    bits: int = 4  # of that copy
    group_size: int = 64  # of that copy: weights that share a scale
    sync_every: int = 1  # updates between refreshes of the sampler's weights; above 1: stale, corrected
    # Objective
    loss_type: str = "grpo"  # the objective, by its name in the table LOSSES
    importance_sampling_level: str = "token"  # or sequence (GSPO, arXiv 2507.18071)
    num_iterations: int = 1  # updates a rollout is used for (mu in the paper)
    clip_eps: float = 0.2  # the ratio is clipped to [1 - clip_eps, 1 + clip_eps_high]; gmpo clips its log
    clip_eps_high: float | None = None  # DAPO's clip-higher; none for clip_eps. For cispo the bound, about 5
    delta: float | None = None  # upper bound of the ratio where A < 0 (INTELLECT-2, arXiv 2505.07291)
    kl_coeff: float = 0.0  # beta; above 0 a frozen reference is kept (under LoRA: same weights, adapters off)
    use_bias_correction_kl: bool = False  # weigh the KL by the ratio, for an unbiased gradient off-policy
    advantage_estimator: str = "group"  # how rewards become advantages, by its name in the table ESTIMATORS
    scale_rewards: str = "group"  # group advantages are divided by the deviation of group or batch, or none
    mask_truncated_completions: bool = False  # leave completions cut at the length limit out of the loss
    top_entropy_quantile: float = 1.0  # train only this share of positions, those of highest entropy
    entropy_coef: float = 0.0  # bonus per nat of a trained token's mean entropy; the first, where adaptive
    use_adaptive_entropy: bool = False  # move entropy_coef to hold the entropy up (arXiv 2505.22312)
    entropy_target: float = 0.2  # nats a token: at most this, entropy_coef is paid and rises, else it falls
    entropy_coef_delta: float = 0.005  # by so much an update
    entropy_coef_min: float = 0.0  # within this
    entropy_coef_max: float = 1.0  # and this
    off_policy_mask_threshold: float | None = None  # drop A < 0 rows with a mean sampler-policy gap above it
    sampler_correction: str = (
        "auto"  # token_truncate (auto where off-policy), token_mask, sequence_truncate, sequence_mask, none
    )
    sampler_correction_min: float | None = None  # lower end of the correction's range
    sampler_correction_max: float = 3.0  # upper end of the correction's range
    sapo_temperature_pos: float = 1.0  # SAPO's gate for positive advantages (arXiv 2511.20347)
    sapo_temperature_neg: float = 1.05  # and for the others
    vespo_k_pos: float = 2.0  # k of VESPO's weight w^k e^(lambda (1 - w)), for advantages of at least 0
    vespo_lambda_pos: float = 3.0  # and its lambda (arXiv 2602.10693)
    vespo_k_neg: float = 3.0  # k for negative advantages
    vespo_lambda_neg: float = 2.0  # and their lambda
    dynamic_sampling_max_batches: int = 0  # times fresh prompts replace a batch's no-signal groups (DAPO)
    # Optimisation
    learning_rate: float = 1e-6  # peak; about 1e-6 for full fine-tuning, 1e-5 for adapters
    lr_scheduler_type: str = "cosine"  # cosine, linear or constant, after the warm-up
    warmup_ratio: float = 0.03  # share of the updates
    num_epochs: float = 1.0  # passes over the prompts
    gradient_accumulation_steps: int = 1  # steps an update
    micro_batch_tokens: int = 16384  # positions in one forward and backward; lower it when memory is short
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, a third slower
    max_grad_norm: float = 1.0  # global norm the gradient is clipped to; 0 for no clipping
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.0  # decoupled, as in AdamW
    max_nan_updates: int = 3  # updates in a row with a non-finite gradient before the run stops
    max_flat_updates: int = 50  # updates in a row without signal before the run saves and fails; 0: never
    use_compile: bool = True  # mx.compile the optimizer's step; GPU: recurring shapes; CUDA: long rollouts
    # Evaluation
    eval_steps: int = 50  # updates between evaluations on the held-out split; 0: only before and after
    eval_samples: int = 200  # rows of the held-out split, a fixed choice; 0 for all
    eval_every_updates: int = 0  # updates between evaluations on a fixed part of the training split; 0: off
    eval_subset_size: int = 100  # rows of that part
    eval_max_new_tokens: int = 0  # tokens an answer may take in evaluation; 0 for max_completion_length
    metric_for_best_model: str = ""  # best checkpoint's: reward_mean, rewards/NAME, em_strict or em_lenient
    # Output
    output_dir: str = "outputs"  # holds one directory a run
    run_name: str = ""  # that directory; empty: the config's name, numbered when taken
    logging_steps: int = 1  # updates between progress lines; the log file has every update
    log_jsonl: bool = True  # write training_log.jsonl and completions.jsonl
    log_completions_steps: int = 10  # updates between samples shown and put in completions.jsonl; 0: never
    report_to: list[str] = field(default_factory=list)  # trackers: tensorboard, wandb, trackio, swanlab
    save_steps: int = 50  # updates between checkpoints; 0: only the final model
    save_total_limit: int = 3  # newest checkpoints kept, besides the best on held-out data; 0 for all
    seed: int = 0  # of the data order, the sampling and the adapters
    # Several processes
    distributed_timeout: float = 120.0  # seconds a rank may be silent; a reward that holds the GIL is silent
    check_weights_steps: int = 50  # updates between checks that ranks' weights agree; 0: at start and saves

    def __post_init__(self):
        tables = {"loss_type": tuple(LOSSES), "advantage_estimator": tuple(ESTIMATORS)}
        check_config(self, tables)  # what cannot work is refused before anything is loaded

    @property
    def objective(self) -> "Loss":
        return LOSSES[self.loss_type]

    @property
    def estimator(self) -> "Estimator":
        return ESTIMATORS[self.advantage_estimator]

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether entropies need a gradient."""
        return self.entropy_coef > 0 or self.use_adaptive_entropy

    @property
    def rewards_drive_alone(self) -> bool:
        """Whether a row whose advantage is 0 has no gradient."""
        others = self.kl_coeff > 0 or self.has_entropy_bonus or self.top_entropy_quantile < 1
        return not others and self.estimator.tokens is None

    @property
    def draws_by_difficulty(self) -> bool:
        """Whether some prompts are drawn less often than others."""
        return min(self.easy_prompt_weight, self.hard_prompt_weight) < 1

    @property
    def prompts_per_update(self) -> int:
        """Of all ranks together."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def rollout_tokens(self) -> int:
        """Longest completion the rollout may write, in tokens."""
        return self.max_new_tokens or self.max_completion_length

    @property
    def prompting(self) -> tuple[str, str, dict]:
        """What build_prompt takes after the question."""
        return self.system_prompt, self.completion_prefix, self.chat_template_kwargs

    @property
    def stops(self) -> list[str]:
        """The stop strings in force.

        A base model that has answered goes on with a next question. The template's words in front of a
        question therefore stop it, unless stop_strings is set.
        """
        head = self.prompt_template.partition("{prompt}")[0].strip()
        if not head or self.stop_strings != ["</answer>"]:
            return self.stop_strings
        line = head.splitlines()[-1].strip()
        return [*self.stop_strings, "\n" + (line if len(line) <= LONGEST_LABEL else line.split()[-1])]

    @property
    def off_policy_sampler(self) -> bool:
        """Whether the sampler's distribution differs from the policy's: other weights, or a filter."""
        return self.quantize_for_rollouts or self.sync_every > 1 or bool(self.sampling_filters)

    @property
    def best_metric(self) -> str:
        """The field of an evaluation's record that chooses the best checkpoint."""
        default = "em_strict" if "correctness_reward_func" in self.reward_funcs else "reward_mean"
        return self.metric_for_best_model or default

    @property
    def sampling(self) -> "Sampling":
        """How a rollout draws."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty)

    @property
    def sampling_filters(self) -> list[str]:
        """The names of the settings in force that filter or reshape the sampled distribution."""
        neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return [name for name, value in neutral.items() if getattr(self, name) != value]

    @property
    def correction(self) -> str | None:
        """The sampler correction in force, or None."""
        if self.sampler_correction == "auto":
            return "token_truncate" if self.off_policy_sampler else None
        return None if self.sampler_correction == "none" else self.sampler_correction


FIELD_TYPES = {f.name: f.type for f in dataclasses.fields(MLXGRPOConfig)}


def load_config(path: str | Path | None = None, overrides: list[str] = ()) -> MLXGRPOConfig:
    """The configuration from defaults, then the TOML file, then `key=value` overrides. Raises UserError."""
    return MLXGRPOConfig(**read_settings(FIELD_TYPES, path, list(overrides))[0])


# ------------------------------------------------------------------------------------------------------------
# Tokenizer
# ------------------------------------------------------------------------------------------------------------


class TiktokenTokenizerWrapper:
    """The tokenizer of a directory with only a tokenizer.pkl, as far as mlx-lm and this script use one.

    Text is always ordinary text, as in nanochat: spelling a special token does not make one, and nothing is
    put in front. Special tokens come from apply_chat_template(tokenize=True) alone; its text form is for
    reading. For mlx-lm's generators: TokenizerWrapper(self, eos_token_ids=self.eos_token_ids).
    """

    chat_template = "nanochat"  # mlx-lm only asks whether there is one
    clean_up_tokenization_spaces = False
    # The chat tokens in the order of a conversation, and what stands for them in a vocabulary without them.
    CHAT = {
        "<|bos|>": "",
        "<|user_start|>": "User: ",
        "<|user_end|>": "\n",
        "<|assistant_start|>": "Assistant: ",
        "<|assistant_end|>": "\n",
    }

    def __init__(self, path):
        """path: a tokenizer.pkl or its directory.

        Raises ValueError("Failed to load tiktoken tokenizer: REASON").
        """
        self.path = Path(path) / "tokenizer.pkl" if Path(path).is_dir() else Path(path)
        try:
            import tiktoken

            state = read_tokenizer_pickle(self.path)  # runs no code from the pickle
            if state["name"] in tiktoken.list_encoding_names():
                raise ValueError(f"{state['name']!r} is the name of an encoding that tiktoken downloads")
            self.encoding = tiktoken.Encoding(**state)  # ValueError where pat_str is no regular expression
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"Failed to load tiktoken tokenizer: {error}") from error
        self.name_or_path = str(self.path.parent)
        self.special_tokens = state["special_tokens"]
        ranks = state["mergeable_ranks"]  # bytes -> id
        # Latin-1 names every byte by one character, so that distinct tokens have distinct names.
        self.vocab = {token.decode("latin-1"): i for token, i in ranks.items()} | self.special_tokens
        self.id_to_token = {i: token for token, i in self.vocab.items()}
        self.id_to_bytes = {i: token for token, i in ranks.items()}
        self.id_to_bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        self.vocab_size = max(self.id_to_bytes) + 1
        self.all_special_tokens = list(self.special_tokens)
        self.all_special_ids = list(self.special_tokens.values())
        # nanochat stops at the end of the assistant's turn, and where a new document would begin.
        stops = [t for t in ("<|assistant_end|>", "<|endoftext|>", "<|bos|>") if t in self.special_tokens]
        self.eos_token = self.pad_token = stops[0] if stops else None
        self.bos_token = "<|bos|>" if "<|bos|>" in stops else None
        self.eos_token_ids = {self.special_tokens[t] for t in stops}
        self.eos_token_id = self.pad_token_id = self.special_tokens.get(self.eos_token)
        self.bos_token_id = self.special_tokens.get(self.bos_token)

    def __len__(self):
        return self.vocab_size

    def encode(self, text, add_special_tokens=True, **_):
        """Text -> ids. add_special_tokens changes nothing: nanochat adds none."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids, skip_special_tokens=False, **_):
        """Ids (list, array or one id) -> text.

        Broken UTF-8 becomes U+FFFD; an id without a token (the model has padding rows) becomes nothing.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        skip = self.all_special_ids if skip_special_tokens else ()
        kept = [i for i in ([ids] if isinstance(ids, int) else ids) if i not in skip]
        return b"".join(self.id_to_bytes.get(i, b"") for i in kept).decode("utf-8", "replace")

    def get_vocab(self):
        return self.vocab

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, str):
            return self.vocab.get(tokens)
        return [self.vocab.get(token) for token in tokens]

    def convert_ids_to_tokens(self, ids):
        if isinstance(ids, int):
            return self.id_to_token.get(ids)
        return [self.id_to_token.get(i) for i in ids]

    def save_pretrained(self, directory, **_):
        """Copy tokenizer.pkl into `directory`."""
        target = Path(directory) / "tokenizer.pkl"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)
        return (str(target),)

    def apply_chat_template(
        self, messages, tokenize=True, add_generation_prompt=None, continue_final_message=False, **_
    ):
        """Messages -> ids (or text): <|bos|>, then by turns <|user_start|>..<|user_end|> and
        <|assistant_start|>..<|assistant_end|>, with a system message joined to the first user message.

        In a vocabulary without these tokens: plain "User: ..", "Assistant: .." lines. add_generation_prompt:
        None means where the user spoke last. Raises ValueError unless the roles alternate, from user on.
        """
        messages = [dict(message) for message in messages]
        if len(messages) > 1 and (messages[0]["role"], messages[1]["role"]) == ("system", "user"):
            system = messages.pop(0)
            messages[0]["content"] = system["content"] + "\n\n" + messages[0]["content"]
        pieces = [("<|bos|>", True)]  # (text, whether it is a special token)
        for i, message in enumerate(messages):
            role = ("user", "assistant")[i % 2]
            content = message["content"]
            if message["role"] != role:
                raise ValueError(f"Message {i} is from {message['role']} but should be from {role}")
            pieces.append((f"<|{role}_start|>", True))
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                tool = {"text": None, "python": "python", "python_output": "output"}[part["type"]]
                text = (part["text"], False)
                pieces += [(f"<|{tool}_start|>", True), text, (f"<|{tool}_end|>", True)] if tool else [text]
            pieces.append((f"<|{role}_end|>", True))
        if continue_final_message:
            pieces.pop()
        elif add_generation_prompt or (
            add_generation_prompt is None and messages and messages[-1]["role"] == "user"
        ):
            if not messages or messages[-1]["role"] != "user":
                raise ValueError("A prompt for the assistant must end with a message from user")
            pieces.append(("<|assistant_start|>", True))
        if not self.CHAT.keys() <= self.special_tokens.keys():
            text = "".join(self.CHAT.get(piece, "") if special else piece for piece, special in pieces)
            return self.encode(text) if tokenize else text
        if not tokenize:
            return "".join(piece for piece, _ in pieces)
        return [
            i
            for piece, special in pieces
            for i in ([self.special_tokens[piece]] if special else self.encode(piece))
        ]


# ------------------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------------------


def build_prompt(
    tokenizer,
    question: str | list[dict],
    system_prompt: str = "",
    completion_prefix: str = "",
    chat_template_kwargs: dict | None = None,
) -> list[int]:
    """Token ids of a prompt: the chat template with system prompt and question, then completion_prefix.

    `question` is the user's text or a list of chat messages, whose own system message is used in place of
    `system_prompt`. Training, evaluation and inference all build prompts here. A template without a system
    role, or one that leaves the system message out, gets it at the head of the first user message. Raises
    UserError where there is no chat template.
    """
    if not getattr(tokenizer, "chat_template", None) and not getattr(tokenizer, "has_chat_template", False):
        raise UserError(
            "The model's tokenizer has no chat template; set prompt_template, such as "
            r"'Question: {prompt}\nAnswer:', for a base model, or use an instruct model"
        )
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
    ids = render_chat(tokenizer, messages, options, own_words=system_prompt)
    return ids + (tokenizer.encode(completion_prefix, add_special_tokens=False) if completion_prefix else [])


def render_chat(tokenizer, messages: list[dict], options: dict, own_words: str = "") -> list[int]:
    """Ids of a chat in the template, with its system message in it.

    own_words: special tokens that are spelt in it stay special; any other spelling is ordinary text. Raises
    UserError where the template accepts the chat in no form.
    """
    import jinja2

    messages, ordinary = without_special_tokens(tokenizer, messages, own_words)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    reason = "it leaves the system message out"
    for trial in [messages, system_in_first_user_message(messages)] if system else [messages]:
        try:
            text = tokenizer.apply_chat_template(trial, tokenize=False, **options)
        except (jinja2.TemplateError, ValueError) as error:
            reason = error
            continue
        if without_spaces(system) in without_spaces(text):  # templates trim the messages
            if isinstance(tokenizer, TiktokenTokenizerWrapper):
                return list(tokenizer.apply_chat_template(trial, tokenize=True, **options))
            return encode_chat(tokenizer, text, ordinary)
    raise UserError(f"The model's chat template refuses the prompt: {reason}")


def without_spaces(text: str) -> str:
    return "".join(text.split())


def jinja_string(text: str) -> str:
    """The text as a string literal of a chat template."""
    return json.dumps(text, ensure_ascii=False)


def use_prompt_template(tokenizer, template: str) -> None:
    """Make a plain text with {prompt} in it the tokenizer's chat template, which is saved with the model.

    The text begins with the begin-of-text token where the tokenizer puts one. A system message goes above the
    text; in a chat, each turn of the user is the text again, after the answer before it.
    """
    if isinstance(tokenizer, TiktokenTokenizerWrapper):
        raise UserError(
            "prompt_template cannot be used with a tokenizer.pkl, which has a chat form of its own"
        )
    before, _, after = template.partition("{prompt}")
    begins = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    gap = "" if after[-1:].isspace() else " "  # between the text and an answer
    tokenizer.chat_template = (
        ("{{ bos_token }}" if begins else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        + "{% elif message['role'] == 'user' %}{{ "
        + f"{jinja_string(before)} + message['content'] + {jinja_string(after)}"
        + " }}{% else %}{{ "
        + f"{jinja_string(gap)} + message['content'] + "
        + "'\\n\\n' }}{% endif %}{% endfor %}"
    )
    tokenizer.has_chat_template = True


def set_template(tokenizer, config: MLXGRPOConfig) -> None:
    """Apply prompt_template, and warn of chat_template_kwargs that the template does not read.

    Raises UserError where the tokenizer cannot take a prompt_template.
    """
    if config.prompt_template:
        use_prompt_template(tokenizer, config.prompt_template)
    template = str(getattr(tokenizer, "chat_template", ""))
    # mlx-lm passes enable_thinking on by the name that the template uses.
    renamed = {"enable_thinking": getattr(tokenizer, "_thinking_kwarg", "enable_thinking")}
    unread = [
        name
        for name in config.chat_template_kwargs
        if not re.search(rf"\b{re.escape(renamed.get(name, name))}\b", template)
    ]
    if unread:
        print(
            f"Warning: the model's chat template does not read {', '.join(unread)} of chat_template_kwargs",
            file=sys.stderr,
        )


def primed_text(tokenizer, prompt: list[int], completion_prefix: str = "") -> str:
    """The end of a prompt that is scored with the completion: the template's <think>, and the prefix."""
    prefix = tokenizer.encode(completion_prefix, add_special_tokens=False) if completion_prefix else []
    opened = re.search(r"<think>\s*\Z", tokenizer.decode(prompt[: len(prompt) - len(prefix)][-16:]))
    return (opened[0] if opened else "") + completion_prefix


# ------------------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------------------


def open_model(name: str, adapter_path: str | None = None, trust_remote_code: bool = False):
    """(model, tokenizer, its config.json): how every script of this project opens a model.

    On a CPU a half-precision model is computed in float32, and says so (precision.py).
    Raises UserError where the directory holds no model that fits its tokenizer.
    """
    from mlx_lm.utils import load_adapters, load_model as mlx_load_model, load_tokenizer

    folder = local_path(name)
    if folder and not adapter_path and is_adapter_alone(folder):  # as the checkpoints of an adapter run are
        name = adapter_base(folder)
        adapter_path = str(folder)
    path = resolve_model(name)
    if trust_remote_code:
        print(
            f"trust_remote_code: Python files that come with {name} run on this machine with all your rights",
            file=sys.stderr,
        )
    try:
        model_config = read_model_config(path)
        own_code = path / model_config["model_file"] if "model_file" in model_config else None
        # The one model file that needs no trust is the one this project ships, byte for byte.
        known = (
            own_code is not None
            and own_code.is_file()
            and own_code.read_bytes() == (ROOT / "mlx_grpo" / "models" / "nanochat_2026.py").read_bytes()
        )
        model, model_config = mlx_load_model(
            path, model_config=model_config, trust_remote_code=trust_remote_code or known, lazy=True
        )
        if adapter_path:
            load_adapters(model, adapter_path)
            model.eval()
        half = widen(model)
        mx.eval(model.parameters())
        if (path / "tokenizer.pkl").is_file() and not (path / "tokenizer.json").is_file():
            tokenizer = TiktokenTokenizerWrapper(path)
            ends = model_config.get("eos_token_id")
            tokenizer.eos_token_ids |= {ends} if isinstance(ends, int) else set(ends or ())
        else:
            tokenizer = load_tokenizer(
                path, {"trust_remote_code": trust_remote_code}, eos_token_ids=model_config.get("eos_token_id")
            )
    except (ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        prefix = (
            "" if reason.startswith("Failed to load tiktoken tokenizer") else f"Failed to load model {path}: "
        )
        raise UserError(prefix + reason) from error
    rows = model_config.get("vocab_size") or model_config.get("text_config", {}).get("vocab_size")
    largest = max(tokenizer.get_vocab().values())
    if rows and largest >= rows:
        raise UserError(
            f"The tokenizer does not fit the model in {path}: token id {largest}, vocabulary of {rows}"
        )
    use_swiglu(model)
    if half:
        print(
            f"{name}: {half}, computed in float32 on this CPU, where MLX has no fast {half} product; "
            f"what is saved stays {half}",
            file=sys.stderr,
        )
    return model, tokenizer, model_config


def load_model(config: MLXGRPOConfig):
    """The policy and its tokenizer, with exactly what `fine_tune_type` asks for left trainable.

    Raises UserError where nothing would be trained: a quantised model cannot be trained in full.
    """
    model, tokenizer, _ = open_model(config.model_name, trust_remote_code=config.trust_remote_code)
    set_template(tokenizer, config)
    quantized = is_quantized(model)
    kind = config.fine_tune_type if config.fine_tune_type != "auto" else "lora" if quantized else "full"
    if kind == "full" and quantized:
        raise UserError(
            f"{config.model_name} is quantised and cannot be trained in full; set fine_tune_type to lora"
        )
    if kind == "dora" and any(getattr(m, "bits", 0) in (3, 6) for m in model.modules()):
        raise UserError(
            f"{config.model_name} has 3- or 6-bit layers, which mlx-lm's DoRA cannot train; "
            "set fine_tune_type to lora"
        )
    if quantized and config.quantize_for_rollouts:
        raise UserError(f"{config.model_name} is quantised already; set quantize_for_rollouts to false")
    if kind != "full":
        from mlx_lm.tuner.utils import linear_to_lora_layers

        mx.random.seed(config.seed)  # adapters start at random
        model.freeze()
        blocks = len(model.layers) if config.num_layers < 0 else min(config.num_layers, len(model.layers))
        linear_to_lora_layers(
            model, blocks, {"dropout": 0.0, **config.lora_parameters}, use_dora=kind == "dora"
        )
        if kind == "lora" and any(p.dtype == mx.bfloat16 for _, p in tree_flatten(model.parameters())):
            # mlx-lm makes adapters in float32, to which every activation would be cast. In bfloat16 no step
            # is lost: the optimizer keeps float32 copies. DoRA's stay, as it divides by norms of merged
            # weights.
            for _, layer in adapter_layers(model):
                layer.update(tree_map(lambda p: p.astype(mx.bfloat16), layer.trainable_parameters()))
        if kind == "dora":
            keep_exact(model, dict(tree_flatten(model.trainable_parameters())))
    if config.grad_checkpoint:
        for kind_of_layer in {type(layer) for layer in model.layers}:
            kind_of_layer.__call__ = checkpointed(kind_of_layer.__call__)
    if not tree_flatten(model.trainable_parameters()):
        raise UserError("Nothing would be trained: no parameter is trainable with these adapter settings")
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------


def get_gsm8k_questions(split: str = "train") -> list[dict]:
    """GSM8K's rows of a split (arXiv 2110.14168), {"prompt", "answer"}: the default dataset.

    Raises RunError where the hub cannot be reached.
    """
    return load_dataset_split(MLXGRPOConfig(), split)


def load_dataset_split(config: MLXGRPOConfig, split: str) -> list[dict]:
    """The rows of split "train" or "test" as {"prompt", "answer", other columns}, within max_train_samples.

    The held-out split is eval_dataset, else the dataset's test (validation, valid, val or dev) split, else
    the rows of eval_fraction of the training prompts, the same for every seed. Rows of one prompt stay
    together.
    """

    def open_split(name, split):
        return open_dataset(name, config.dataset_config, split, (config.prompt_field, config.answer_field))

    test = open_split(config.eval_dataset or config.dataset, "test")
    if test is None and config.eval_dataset:
        test = open_split(config.eval_dataset, "train")
    if split == "test" and test is not None:
        return check_rows(config, test)
    training = open_split(config.dataset, "train")
    if training is None:
        raise UserError(
            f"Dataset has no training split: {config.dataset} needs a train.jsonl, .json, .csv or .parquet"
        )
    rows = check_rows(config, training)
    if test is None:
        keys = [prompt_key(row["prompt"]) for row in rows]
        if len(set(keys)) == 1:  # one prompt, which both splits then have: a warning says so
            keys = list(range(len(rows)))
        prompts = list(dict.fromkeys(keys))
        order = np.random.default_rng(0).permutation(len(prompts))
        aside = {prompts[i] for i in order[: max(1, round(len(prompts) * config.eval_fraction))]}
        if len(aside) == len(prompts):
            raise UserError(
                f"{training[0][1]} has too few rows ({len(rows)}) to set some aside; give an eval_dataset"
            )
        rows = [row for row, key in zip(rows, keys) if (key in aside) == (split == "test")]
    return rows[: config.max_train_samples or None] if split == "train" else rows


def check_rows(config, parts: list[tuple]) -> list[DataRow]:
    """The rows of all (rows, source) parts, each with its columns, "prompt" and "answer".

    Where at least half of the gold answers are numbers, however people write them, those become plain
    numbers: "15 dollars" becomes 15. Raises UserError with file and row (counted from 1) where a field is
    missing, empty or of the wrong type.
    """
    checked = [
        check_row(config, row, f"{source}, row {number}")
        for rows, source in parts
        for number, row in enumerate(rows, 1)
    ]
    if not checked:
        raise UserError(f"No rows in {parts[0][1]}")
    quantities = [read_quantity(row["answer"]) for row in checked]
    if 2 * sum(quantity is not None for quantity in quantities) >= len(checked):
        for row, quantity in zip(checked, quantities):
            if quantity and parse_number(row["answer"]) is None:
                row["answer"] = quantity.text
    return checked


def check_row(config, row: dict, place: str) -> DataRow:
    """A row with "prompt" and the gold "answer".

    place: its file and row, with which UserError begins where a field is not what it must be.
    """
    found = {}
    for name in (config.prompt_field, config.answer_field):
        try:
            value = found[name] = field_of(row, name)
        except KeyError:
            raise UserError(
                f"{place}: no field {name!r}; it has {', '.join(row)}. Set prompt_field and answer_field"
            ) from None
        if value is None or value == [] or value != value or not str(value).strip():
            raise UserError(f"{place}: field {name!r} is empty")
    question = found[config.prompt_field]
    answer = found[config.answer_field]
    chat = isinstance(question, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in question
    )
    if not isinstance(question, str) and not chat:
        raise UserError(f"{place}: field {config.prompt_field!r} is neither text nor chat messages")
    try:
        prompt = read_chat(question) if chat else question
    except ValueError as error:
        raise UserError(f"{place}: field {config.prompt_field!r}: {error}") from None
    if not isinstance(answer, (str, int, float, Decimal)):
        raise UserError(f"{place}: field {config.answer_field!r} is neither text nor a number")
    gold = extract_gold_answer(str(answer))
    if not gold:
        raise UserError(f"{place}: field {config.answer_field!r} is empty")
    checked = DataRow({**row, "prompt": prompt, "answer": gold})
    checked.place = place
    checked.cut = chat and len(prompt) < len(question)
    return checked


def context_length(model) -> float:
    """Positions the model can have, prompt and completion together; infinite where it does not say."""
    return getattr(getattr(model, "args", None), "max_position_embeddings", None) or math.inf


def fitting_rows(
    tokenizer, config: MLXGRPOConfig, context: float, rows: list[dict], split: str
) -> list[dict]:
    """The rows whose prompt fits max_prompt_length and the model's context, with its ids as "prompt_ids"."""
    limit = min(config.max_prompt_length, context - config.rollout_tokens)
    if limit < 1:
        raise UserError(
            f"max_completion_length ({config.rollout_tokens}) leaves no room for a prompt "
            f"in the model's context of {context}"
        )
    ids = [build_prompt(tokenizer, row["prompt"], *config.prompting) for row in rows]
    kept = [{**row, "prompt_ids": prompt} for row, prompt in zip(rows, ids) if len(prompt) <= limit]
    if len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        print(f"{dropped} of {len(rows)} {split} prompts are longer than {limit} tokens and are dropped")
    if not kept:
        raise UserError(
            f"No {split} prompt is within {limit} tokens; "
            f"raise max_prompt_length (the shortest has {min(map(len, ids))})"
        )
    return kept


def prompt_rows(
    splits: dict[str, list[dict]], model, tokenizer, config: MLXGRPOConfig
) -> tuple[list[dict], dict[str, list[dict]]]:
    """The training rows, and by split the fixed rows of evaluations, each with its prompt's ids."""
    fitting = functools.partial(fitting_rows, tokenizer, config, context_length(model))
    rows = fitting(splits["train"], "training")
    evaluated = {"test": fixed_subset(fitting(splits["test"], "held-out"), config.eval_samples, config.seed)}
    if config.eval_every_updates:
        evaluated["train"] = fixed_subset(rows, config.eval_subset_size, config.seed)
    return rows, evaluated


@functools.lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through the rows."""
    return np.random.default_rng([seed, 2, epoch]).permutation(rows)


def row_of(number: int, rows: int, seed: int) -> int:
    """Which row prompt `number` is, of an endless stream of epochs, each in its own random order."""
    epoch, place = divmod(number, rows)
    return int(epoch_order(rows, seed, epoch)[place])


def draw_rows(rows: list[dict], seed: int, first: int, count: int) -> list[tuple[int, dict]]:
    """(number, row) of `count` prompts from number `first` on."""
    return [(number, rows[row_of(number, len(rows), seed)]) for number in range(first, first + count)]


def draw_by_difficulty(
    rows: list[dict], config: MLXGRPOConfig, history: dict, first: int, count: int
) -> tuple[list[int], list[str]]:
    """The numbers of the next `count` prompts from `first` on, and "easy" or "hard" for each left out.

    Each number has a random draw of its own that decides, so a resumed run and all ranks leave out the same
    ones. At most one epoch's numbers are left out in a row.
    """
    weights = {"": 1.0, "easy": config.easy_prompt_weight, "hard": config.hard_prompt_weight}
    numbers = []
    passed = []
    in_a_row = 0
    for number in itertools.count(first):
        kind = lately(history, row_of(number, len(rows), config.seed), config.difficulty_window)
        if (
            kind
            and in_a_row < len(rows)
            and np.random.default_rng([config.seed, 3, number]).random() >= weights[kind]
        ):
            passed.append(kind)
            in_a_row += 1
            continue
        numbers.append(number)
        in_a_row = 0
        if len(numbers) == count:
            return numbers, passed


# ------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------
# How numbers are read as people write them is in mlx_grpo/answers.py.


def extract_xml_answer(text: str) -> str:
    """What stands in the last complete <answer>..</answer>, stripped; "" where there is none."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    return text[start + len("<answer>") : text.find("</answer>", start)].strip() if start >= 0 else ""


def extract_hash_answer(text: str) -> str | None:
    """What stands on the line of the last ####, as GSM8K writes its gold answers; None without a ####.

    A number comes alone: "#### $1,080" and "#### 1080 dollars" are 1080.
    """
    if "####" not in text:
        return None
    line = text.rsplit("####", 1)[1].strip().partition("\n")[0].strip()
    if parse_number(line) is not None:
        return line.replace(",", "").replace("$", "")
    quantity = read_quantity(line)
    return quantity.text if quantity else unwrapped(line)


def extract_gold_answer(text: str) -> str:
    r"""The answer in a dataset's answer field: after the last ####, in the last \boxed{}, or all of it.

    Markup around the answer is left out.
    """
    hashed = extract_hash_answer(text)
    return unwrapped(text) if hashed is None else hashed


def last_number_is(text: str, gold: str) -> bool:
    """Whether the last number of the text, a fraction or one with spaces too, is the gold answer."""
    return any(same_answer(found, gold) for found in (last_number(text), last_quantity(text)))


def grade(text: str, gold: str) -> tuple[bool, bool]:
    """Exact match of a completion: strict (answer tags required), lenient (or the last number or box).

    What a model thinks, before </think>, is not graded.
    """
    text = after_thinking(text)
    strict = same_answer(extract_xml_answer(text), gold)
    lenient = strict or last_number_is(text, gold) or same_answer(last_boxed(text) or "", gold)
    return strict, lenient


# ------------------------------------------------------------------------------------------------------------
# Rewards
# ------------------------------------------------------------------------------------------------------------
# A reward function takes the completions as chats and each dataset column as a keyword, one value a
# completion, and returns a number for each, or None to abstain.


def contents(completions) -> list[str]:
    """The text of each completion."""
    return [completion[0]["content"] for completion in completions]


def answers_of(completions) -> list[str]:
    """The text of each completion after its </think>: "" where it was cut while thinking."""
    return [after_thinking(text) for text in contents(completions)]


def correctness_reward_func(completions, answer, **kwargs) -> list[float]:
    """2.0 where the number in the answer tags equals the gold answer."""
    return [2.0 if grade(text, gold)[0] else 0.0 for text, gold in zip(contents(completions), answer)]


def last_number_reward_func(completions, answer, **kwargs) -> list[float]:
    """1.0 where the text's last number equals the gold answer; for models that do not know the tags yet."""
    return [1.0 if last_number_is(text, gold) else 0.0 for text, gold in zip(answers_of(completions), answer)]


def int_reward_func(completions, **kwargs) -> list[float]:
    """0.5 where the answer tags hold a whole number and nothing else."""
    numbers = [parse_number(extract_xml_answer(text)) for text in answers_of(completions)]
    return [0.5 if n is not None and n == n.to_integral_value() else 0.0 for n in numbers]


# The next two rewards search with str.find and the like: a regular expression with two lazy parts takes time
# quadratic or cubic in the length of a text that repeats itself.


def strict_format_reward_func(completions, **kwargs) -> list[float]:
    """0.5 where the text is exactly the two tagged parts, each tag on its own line."""
    return [0.5 if has_strict_format(text) else 0.0 for text in answers_of(completions)]


def has_strict_format(text: str) -> bool:
    """Whether the text is the lines <reasoning>, some text, </reasoning>, <answer>, some text, </answer>."""
    text = text.removesuffix("\n")
    opening = "<reasoning>\n"
    closing = "\n</answer>"
    if not (text.startswith(opening) and text.endswith(closing) and has_each_tag_once(text)):
        return False
    reasoning, between, answer = text[len(opening) : -len(closing)].partition("\n</reasoning>\n<answer>\n")
    return bool(reasoning and between and answer)


def soft_format_reward_func(completions, **kwargs) -> list[float]:
    """0.5 where the two tagged parts follow each other anywhere in the text, on whatever lines."""
    return [0.5 if has_soft_format(text) else 0.0 for text in answers_of(completions)]


def has_soft_format(text: str) -> bool:
    """Whether the tags occur in order, with only white space between </reasoning> and <answer>."""
    _, opening, rest = text.partition("<reasoning>")
    middle = re.search(r"</reasoning>\s*<answer>", rest) if opening else None
    return bool(middle) and "</answer>" in rest[middle.end() :]


TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


def has_each_tag_once(text: str) -> bool:
    return all(text.count(tag) == 1 for tag in TAGS)


def xmlcount_reward_func(completions, **kwargs) -> list[float]:
    """0.125 for each of the four tags that occurs exactly once, less 0.001 a character after the last one."""
    return [tag_score(text) for text in answers_of(completions)]


def tag_score(text: str) -> float:
    """The xmlcount reward of one text; never below 0."""
    score = sum(0.125 for tag in TAGS if text.count(tag) == 1)
    _, tag, trailing = text.rpartition("</answer>")
    return max(0.0, score - 0.001 * len(trailing.strip())) if tag else score


def math_verify_reward_func(completions, answer, **kwargs) -> list[float | None]:
    """2.0 where math-verify finds the answer, in the tags or else the text, equal to the gold one.

    None, no opinion, where the gold answer cannot be read.
    """
    from math_verify import parse, verify

    rewards = []
    for text, gold in zip(answers_of(completions), answer):
        expected = parse(boxed(gold))
        tagged = extract_xml_answer(text)
        given = parse(boxed(tagged) if tagged else text)
        rewards.append((2.0 if verify(expected, given) else 0.0) if expected else None)
    return rewards


math_verify_reward_func.needs = ("math_verify", "math")  # a package, and the extra that brings it


def boxed(text: str) -> str:
    r"""The text in a \boxed{}, the form in which math-verify need not guess."""
    return text if r"\boxed" in text else rf"\boxed{{{text}}}"


def soft_overlong_reward_func(completions, completion_ids, max_completion_length, **kwargs) -> list[float]:
    """DAPO's soft length penalty (arXiv 2503.14476, eq. 13): 0 falling to -1 over the limit's last fifth."""
    margin = max(1, max_completion_length // 5)
    return [
        max(-1.0, min(0.0, (max_completion_length - margin - len(ids)) / margin)) for ids in completion_ids
    ]


def repetition_reward_func(completions, **kwargs) -> list[float]:
    """A guard against loops: minus the share of repeated 4-word sequences, from 0 to nearly -1."""
    scores = []
    for text in contents(completions):
        words = text.split()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        scores.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return scores


BUILT_IN_REWARDS = {
    function.__name__: function
    for function in (
        correctness_reward_func,
        last_number_reward_func,
        int_reward_func,
        strict_format_reward_func,
        soft_format_reward_func,
        xmlcount_reward_func,
        math_verify_reward_func,
        soft_overlong_reward_func,
        repetition_reward_func,
    )
}
# Rewards with only two values, 0 and this: the interval of their mean is that of a proportion.
ALL_OR_NOTHING = {
    "correctness_reward_func": 2.0, "last_number_reward_func": 1.0, "int_reward_func": 0.5,
    "strict_format_reward_func": 0.5, "soft_format_reward_func": 0.5, "math_verify_reward_func": 2.0,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Rollout
# ------------------------------------------------------------------------------------------------------------

STREAM_ROWS = 16  # the fewest rows that are worth a stream of their own


@dataclass(frozen=True)
class Sampling:
    """How the next id is drawn; temperature 0 takes the most likely one."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(eq=False)
class Completion:
    """What was sampled for a prompt. The loss reads the token ids; the text is for rewards and logs."""

    ids: list[int]  # the id that ended it included
    sampler_logps: list[float]  # each id's log-prob under the distribution it was drawn from
    mask: list[int]  # 1 where the policy wrote the id
    finish_reason: str  # "eos", "stop" (a stop string) or "length"
    text: str  # what is scored: what primed it, and what follows without end and padding ids
    rewards: list[float] = field(default_factory=list)  # one a reward function, NaN where it abstained


@dataclass(eq=False)
class Group:
    """A prompt with its G completions."""

    row: dict  # of the dataset: its columns, and the prompt as it was written
    prompt: list[int]  # ids
    completions: list[Completion]


def completion_text(tokenizer, ids: list[int]) -> str:
    """The text of a completion's ids, without end and padding ids.

    Other special tokens stay: a model's tags may be among them.
    """
    left_out = {*tokenizer.eos_token_ids, getattr(tokenizer, "pad_token_id", None)}
    return tokenizer.decode([i for i in ids if i not in left_out])


def random_key(*parts) -> mx.array:
    """A key made of `parts` alone: no random state needs saving, and other parts give other numbers."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return mx.random.key(int.from_bytes(digest) >> 1)


def sample(
    logits: mx.array, uniforms: mx.array, sampling: Sampling, seen: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Draw one id a row: logits (N, V), uniforms (N,) in [0, 1) -> ids (N,) and their log-probs (N,).

    Inverse transform sampling: one random number a row, so a row's draws do not depend on its neighbours.
    seen: (N, V) bool, the ids that repetition_penalty applies to, or None.
    """
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    logits = logits.astype(mx.float32)
    if seen is not None:  # (N, V): ids of the prompt and of the completion so far (CTRL, arXiv 1909.05858)
        penalty = sampling.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits / (sampling.temperature or 1.0)
    if sampling.temperature:
        top_k = sampling.top_k if sampling.top_k < logits.shape[-1] else 0
        filters = ((top_k, apply_top_k), (sampling.top_p % 1.0, apply_top_p), (sampling.min_p, apply_min_p))
        for value, keep_likely in filters:
            if value:
                logits = keep_likely(logits - mx.logsumexp(logits, axis=-1, keepdims=True), value)
    probs = softmax(logits)
    if sampling.temperature:
        cumulative = mx.cumsum(probs, axis=-1)
        # The first id that reaches a threshold in (0, total]: never one whose probability is 0.
        ids = mx.sum(cumulative < (1 - uniforms[:, None]) * cumulative[:, -1:], axis=-1)
    else:
        ids = mx.argmax(logits, axis=-1)
    return ids, mx.log(mx.take_along_axis(probs, ids[:, None], axis=-1)[:, 0])


def row_uniforms(keys: list[mx.array], generations: int, length: int) -> mx.array:
    """The random numbers (P*G, T) in [0, 1) of each prompt's rows, from the prompt's key."""
    row_keys = mx.concatenate([mx.random.split(key, generations) for key in keys])
    return mx.vmap(lambda key: mx.random.uniform(shape=(length,), key=key))(row_keys)


def generate(
    model, tokenizer, prompts, *, sampling=Sampling(), max_new_tokens=512, num_generations=1,
    stop_strings=(), keys=None, kv_budget=None, most_rows=None, progress=None, decoder=None, prefix="",
) -> list[Completion]:  # fmt: skip
    """Complete each of B prompts (lists of ids) num_generations times: N = B*G completions, in prompt order.

    keys: (B, 2) random keys, one a prompt, which alone decide its draws, whatever else is in the batch; not
    needed at temperature 0. kv_budget: bytes of KV cache, most_rows: completions at a time; prompts beyond
    them wait for the next batch. progress: called with the number of prompts done. decoder: the model's, kept
    between calls; None for plain MLX. prefix: build_prompt's completion_prefix; texts begin with it, and with
    a <think> that the template opened. Models that cannot be padded decode prompts of equal length together.
    """
    decoder = decoder or Decoder(model)
    penalised = sampling.repetition_penalty != 1.0
    draw = functools.partial(sample, sampling=sampling)
    primed = [primed_text(tokenizer, ids, prefix) for ids in prompts]
    rows = [
        [Row(tokenizer, stop_strings, max_new_tokens, text) for _ in range(num_generations)]
        for text in primed
    ]
    padded = can_pad(model)
    budget = kv_budget or memory_bytes() // 4
    most = int(budget / max(1, cache_bytes(model, max(map(len, prompts), default=0) + max_new_tokens)))
    most = max(num_generations, min(most, most_rows or most))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours need little padding
    while order:
        batch = order[: max(1, most // num_generations)]
        if not padded:
            batch = [i for i in batch if len(prompts[i]) == len(prompts[batch[0]])]
        order = order[len(batch) :]
        with streams_of_cores(min(len(batch), len(batch) * num_generations // STREAM_ROWS)) as streams:
            running = []
            for part in np.array_split(batch, len(streams)):
                tokens, pads = left_pad([prompts[i] for i in part], max(len(prompts[i]) for i in part))
                equal = len({len(prompts[i]) for i in part}) == 1  # without padding attention needs no mask
                part_rows = [row for i in part for row in rows[i]]
                uniforms = mx.zeros((len(part_rows), max_new_tokens))
                if sampling.temperature:
                    uniforms = row_uniforms([keys[i] for i in part], num_generations, max_new_tokens)
                pads = None if equal else pads
                positions = decode(decoder, tokens, pads, part_rows, uniforms, draw, penalised)
                running.append(positions)
            evaluate_by_turns(streams, running)
        if progress:
            progress(len(batch))
    return [
        Completion(
            row.ids, row.logps, [1] * len(row.ids), row.finish_reason,
            row.primed + completion_text(tokenizer, row.ids),
        )
        for group in rows
        for row in group
    ]  # fmt: skip


def reward_columns(flat: list[tuple[Group, Completion]]) -> dict[str, list]:
    """What reward functions get besides completions: columns, prompts and ids, one value a completion."""
    names = set().union(*(group.row for group, _ in flat)) - {"prompt"}  # given as "prompts"
    return {
        **{name: [group.row.get(name) for group, _ in flat] for name in names},
        "prompts": [group.row["prompt"] for group, _ in flat],
        "completion_ids": [completion.ids for _, completion in flat],
    }


def score_groups(groups: list[Group], functions: list, timeout: float, max_completion_length: int) -> None:
    """Set every completion's rewards, one a function, NaN where it abstains. Raises RunError if one fails."""
    flat = [(group, completion) for group in groups for completion in group.completions]
    if not flat:  # fewer prompts than ranks
        return
    columns = reward_columns(flat) | {"max_completion_length": max_completion_length}
    rewards = score(functions, timeout, [completion.text for _, completion in flat], columns)  # (F, N)
    for (_, completion), values in zip(flat, rewards.T):
        completion.rewards = values.tolist()


# ------------------------------------------------------------------------------------------------------------
# Objective: pure functions of arrays
# ------------------------------------------------------------------------------------------------------------
#     rewards (B, G) -- ESTIMATORS --> advantages (B, G) -- LOSSES --> the loss of N = B*G rows, and metrics
#
# An entry of a table is all that an estimator or a loss needs; CONTRIBUTING.md says how one is added.


@dataclass(frozen=True)
class ScoredGroups:
    """Rewards as the estimators read them, (B, G) each unless said otherwise; 0 where nothing was scored."""

    rewards: mx.array
    scored: mx.array  # bool
    count: mx.array  # (B, 1), scored completions of a group
    mean: mx.array  # (B, 1), of those
    centred: mx.array  # rewards less the mean
    signal: mx.array  # bool: scored, in a group whose rewards are not all equal

    @classmethod
    def of(cls, rewards: mx.array) -> "ScoredGroups":
        """rewards: (B, G), NaN where every function abstained."""
        scored = ~mx.isnan(rewards)
        known = mx.where(scored, rewards, 0.0)
        count = scored.sum(axis=1, keepdims=True)
        mean = known.sum(axis=1, keepdims=True) / mx.maximum(count, 1)
        # Equality is exact: rounding in the mean must not make a tiny advantage that a division blows up.
        highest = mx.where(scored, known, -mx.inf).max(axis=1, keepdims=True)
        lowest = mx.where(scored, known, mx.inf).min(axis=1, keepdims=True)
        centred = mx.where(scored, known - mean, 0.0)
        return cls(known, scored, count, mean, centred, signal=scored & (highest > lowest))


def scaled_by_deviation(groups: ScoredGroups, scale_rewards: str) -> mx.array:
    """(r - mean) / (std + 1e-4), ddof 1 (DeepSeekMath, arXiv 2402.03300, section 4.1.2); the group's standard
    deviation, the whole batch's ("batch"), or not divided ("none": Dr. GRPO, arXiv 2503.20783)."""
    if scale_rewards == "none":
        return groups.centred
    if scale_rewards == "group":
        variance = (groups.centred**2).sum(axis=1, keepdims=True) / mx.maximum(groups.count - 1, 1)
    else:
        count = groups.scored.sum()
        spread = mx.where(groups.scored, groups.rewards - groups.rewards.sum() / mx.maximum(count, 1), 0.0)
        variance = (spread**2).sum() / mx.maximum(count - 1, 1)
    return groups.centred / (mx.sqrt(variance) + 1e-4)


def leave_one_out(groups: ScoredGroups) -> mx.array:
    """RLOO: r less the mean of the group's other rewards, an unbiased baseline (arXiv 2402.14740)."""
    others = mx.maximum(groups.count - 1, 1)
    return groups.rewards - (groups.rewards.sum(axis=1, keepdims=True) - groups.rewards) / others


def batch_normalised(groups: ScoredGroups) -> mx.array:
    """REINFORCE++ with baseline (arXiv 2501.03262): r less its group's mean, over that's deviation.

    The batch's mean need not be subtracted: every group's is 0. Lone rows have no baseline, and do not count.
    """
    counted = groups.scored & (groups.count > 1)
    variance = mx.where(counted, groups.centred**2, 0.0).sum() / mx.maximum(counted.sum() - 1, 1)
    return groups.centred / (mx.sqrt(variance) + 1e-4)


def by_mean_reward(groups: ScoredGroups) -> mx.array:
    """MaxRL: (r - mean) / mean (arXiv 2602.02710, Algorithm 1), for rewards of at least 0.

    With rewards of 0 and 1 the mean is the share of right answers, and the expected gradient that of
    sum_k pass@k / k, which tends to the log-likelihood of a right answer: rarely solved prompts weigh more.
    """
    lowest = groups.rewards.min().item()
    if lowest < 0:
        raise UserError(
            "advantage_estimator maxrl divides by a group's mean reward, so none may be negative, and one is "
            f"{lowest:.6g}; add a constant to the rewards, or choose another advantage_estimator"
        )
    return groups.centred / mx.where(groups.mean > 0, groups.mean, 1.0)


@dataclass(frozen=True)
class Estimator:
    """How rewards become advantages."""

    rows: Callable  # (ScoredGroups, **options) -> (B, G), of which rows without signal become 0
    options: tuple[str, ...] = ()  # settings that `rows` takes
    scales: tuple[str, ...] = ("group", "none")  # values of scale_rewards that do not contradict it
    # Where tokens have advantages of their own, a micro-batch at a time: (advantages (N,), old_logps (N, T),
    # ref_logps (N, T), None without kl_coeff, mask (N, T)) -> (N, T)
    tokens: Callable | None = None


ESTIMATORS = {
    "group": Estimator(scaled_by_deviation, options=("scale_rewards",), scales=CHOICES["scale_rewards"]),
    "rloo": Estimator(leave_one_out),
    "reinforce_plus_plus_baseline": Estimator(batch_normalised, scales=("group", "batch")),
    "maxrl": Estimator(by_mean_reward),
}


def estimate_advantages(rewards: mx.array, estimator: str, scale_rewards: str = "group") -> mx.array:
    """Advantages (B, G) of rewards (B, G), NaN where nothing was scored, by an entry of ESTIMATORS.

    Rows without a score, groups with fewer than two, and groups whose rewards are all equal get exactly 0.
    """
    if scale_rewards not in CHOICES["scale_rewards"]:
        raise ValueError(f"Unknown scale_rewards: {scale_rewards!r}")
    chosen = ESTIMATORS[estimator]
    groups = ScoredGroups.of(rewards)
    settings = {"scale_rewards": scale_rewards}
    advantages = chosen.rows(groups, **{name: settings[name] for name in chosen.options})
    return mx.where(groups.signal, advantages, 0.0)


def group_advantages(rewards: mx.array, scale_rewards: str = "group") -> mx.array:
    """GRPO's advantages (B, G) of rewards (B, G), NaN where nothing was scored."""
    return estimate_advantages(rewards, "group", scale_rewards)


def total_rewards(rewards: np.ndarray, weights: list[float]) -> np.ndarray:
    """Rewards (F, ...) -> their weighted sum (...), without functions that abstained; NaN where all did."""
    weighted = np.moveaxis(rewards, 0, -1) * np.array(weights)
    silent = np.isnan(rewards).all(axis=0)
    return np.where(silent, np.nan, np.nansum(weighted, axis=-1))


def combine_rewards(
    rewards: np.ndarray, weights: list[float], config: MLXGRPOConfig
) -> tuple[np.ndarray, mx.array]:
    """Rewards (F, B, G), NaN where a function abstained -> every completion's reward and advantage, (B, G).

    sum_then_normalize: the weighted sum over functions, then the estimator. normalize_then_sum: the group
    advantages of each function, weighted and summed, then scaled over the batch: no function drowns another.
    """
    total = total_rewards(rewards, weights)
    if config.multi_objective_aggregation == "sum_then_normalize":
        summed = mx.array(total, dtype=mx.float32)
        return total, estimate_advantages(summed, config.advantage_estimator, config.scale_rewards)
    each = [w * group_advantages(mx.array(r, dtype=mx.float32), "group") for r, w in zip(rewards, weights)]
    summed = sum(each)
    unmoved = sum(mx.abs(a) for a in each) == 0  # tested before the mean is subtracted, which rounds
    return total, mx.where(unmoved, 0.0, (summed - summed.mean()) / (mx.sqrt(mx.var(summed, ddof=1)) + 1e-4))


# Losses. What they share is a record of arrays, and the sizes that a sum may be divided by.


@dataclass(frozen=True)
class Tokens:
    """A batch as the losses read it: (N, T) unless said otherwise, 0 in the padding."""

    logps: mx.array  # the policy's; the gradient enters here
    log_ratio: mx.array  # logps less the old policy's
    by_row: bool  # sequence level: one ratio a row
    advantages: mx.array  # (N, 1), or (N, T) from an estimator with a say for each token
    mask: mx.array  # 1 on trained positions
    kept: mx.array  # the mask without what the top-entropy mask drops
    correction: mx.array | None = None  # sampler correction, (N, T) or (N, 1), gradient stopped

    @property
    def lengths(self) -> mx.array:
        """(N, 1), trained positions of each row."""
        return self.mask.sum(axis=1, keepdims=True)

    @property
    def ratio(self) -> mx.array:
        """r: a token's own (GRPO, eq. 3), or its row's geometric mean, (N, 1) (GSPO, 2507.18071, eq. 7).

        Beyond e^+-20 it is held there: past every clip, and finite.
        """
        log_ratio = self.row_mean(self.log_ratio) if self.by_row else self.log_ratio
        return mx.exp(mx.clip(log_ratio, -20.0, 20.0))

    def row_mean(self, values: mx.array) -> mx.array:
        """(N, 1)"""
        return (values * self.mask).sum(axis=1, keepdims=True) / mx.maximum(self.lengths, 1)

    def mean(self, values: mx.array) -> mx.array:
        """Of all trained tokens."""
        return (values * self.mask).sum() / mx.maximum(self.mask.sum(), 1)


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one optimizer step over all its micro-batches and processes: what a loss may divide by.

    A micro-batch divides its own sums by the sizes of the whole, so that the parts just add up.
    """

    rows: mx.array | int
    tokens: mx.array  # trained
    entropy_tokens: mx.array  # those of them within the top-entropy mask
    generation_tokens: mx.array | float  # trained, of the generation batch that the step is of
    longest: int  # max_completion_length


def clipped_surrogate(x: Tokens, clip_eps, clip_eps_high, delta) -> mx.array:
    """-min(r A, clip(r, 1-eps, 1+eps_high) A) (PPO, arXiv 1707.06347, eq. 7; GRPO, eq. 3; DAPO for eps_high).

    The minimum leaves r open above where A < 0: delta bounds it there (INTELLECT-2, arXiv 2505.07291).
    """
    bounded = x.ratio if delta is None else mx.minimum(x.ratio, delta)
    clipped = mx.clip(x.ratio, 1 - clip_eps, 1 + clip_eps_high)
    return -mx.minimum(bounded * x.advantages, clipped * x.advantages)


def clipped_weight(x: Tokens, clip_eps_high) -> mx.array:
    """-sg(min(r, eps_high)) A logp: the ratio is a weight, and every token keeps its gradient (CISPO,
    MiniMax-M1, arXiv 2506.13585, eq. 4)."""
    return -mx.stop_gradient(mx.minimum(x.ratio, clip_eps_high)) * x.advantages * x.logps


def sigmoid_gate(x: Tokens, sapo_temperature_pos, sapo_temperature_neg) -> mx.array:
    """-(4/tau) sigmoid(tau (r - 1)) A: a gate in place of the clip, tau by A's sign (2511.20347, eq. 6)."""
    tau = mx.where(x.advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    gate = 1 / (1 + mx.exp(-tau * (x.ratio - 1)))  # mx.sigmoid's gradient, s (1 - s), rounds to 0
    return -(4 / tau) * gate * x.advantages


def gamma_weight(x: Tokens, vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg) -> mx.array:
    """phi(w) = w^k e^(lambda (1 - w)) of a row's whole ratio w, gradient stopped, (N, 1) (VESPO, 2602.10693).

    A sampler correction c is part of w: log w = sum_t log r + log c, held within [1e-8, e^20].
    """
    lowest = math.log(1e-8)
    log_w = (mx.clip(x.log_ratio, -20.0, 20.0) * x.mask).sum(axis=1, keepdims=True)
    if x.correction is not None:  # a masked token's is 0, which counts as 1e-8
        log_c = mx.clip(mx.log(mx.maximum(x.correction, 1e-8)), lowest, 20.0)
        log_w = log_w + (log_c * x.mask).sum(axis=1, keepdims=True)
    log_w = mx.clip(log_w, lowest, 20.0)
    k = mx.where(x.advantages >= 0, vespo_k_pos, vespo_k_neg)
    lam = mx.where(x.advantages >= 0, vespo_lambda_pos, vespo_lambda_neg)
    return mx.stop_gradient(mx.exp(lam + k * log_w - lam * mx.exp(log_w)))


def gamma_weighted(x: Tokens, **options) -> mx.array:
    """-phi(w) A logp (VESPO)."""
    return -gamma_weight(x, **options) * x.advantages * x.logps


def geometric_mean(x: Tokens, clip_eps, clip_eps_high) -> mx.array:
    """-(prod_t clipped r_t)^(1/|o|) A, one term a row (GMPO, arXiv 2507.20673).

    Each r is clipped before the mean, in log space and on the side where A pushes: to at most e^eps_high
    where A > 0, to at least e^-eps otherwise. Tokens that the top-entropy mask drops leave the mean. The
    row's term is on each kept token, scaled so that the mean over the row is the term.
    """
    log_ratio = mx.clip(x.log_ratio, -20.0, 20.0)
    clipped = mx.where(
        x.advantages > 0, mx.minimum(log_ratio, clip_eps_high), mx.maximum(log_ratio, -clip_eps)
    )
    kept = mx.maximum(x.kept.sum(axis=1, keepdims=True), 1)  # (N, 1)
    ratio = mx.exp((clipped * x.kept).sum(axis=1, keepdims=True) / kept)
    return -ratio * x.advantages * x.lengths / kept


def mean_of_row_means(sums: mx.array, lengths: mx.array, step: StepSizes) -> mx.array:
    """Each row by its length, then the mean over rows: a token of a long row weighs less (GRPO, eq. 3)."""
    return (sums / mx.maximum(lengths, 1)).sum() / step.rows


def mean_of_row_sums(sums: mx.array, lengths: mx.array, step: StepSizes) -> mx.array:
    """The mean over rows of their sums: rows weigh by their length (LUSPO)."""
    return sums.sum() / step.rows


def mean_of_tokens(sums: mx.array, lengths: mx.array, step: StepSizes) -> mx.array:
    """All tokens of the step alike (BNPO)."""
    return sums.sum() / mx.maximum(step.tokens, 1)


def mean_of_generation_tokens(sums: mx.array, lengths: mx.array, step: StepSizes) -> mx.array:
    """All tokens of the generation batch alike, of which the step may be a part (DAPO, arXiv 2503.14476)."""
    return sums.sum() / mx.maximum(step.generation_tokens, 1)


def by_constant(sums: mx.array, lengths: mx.array, step: StepSizes) -> mx.array:
    """By rows times the length limit, a constant: length earns and costs nothing (Dr. GRPO, 2503.20783)."""
    return sums.sum() / (step.rows * step.longest)


# Metrics. A table says of each how a step's comes from those of its micro-batches.


@dataclass(frozen=True)
class PartSizes:
    """Sizes of a step's P micro-batches, and of the step, with its rows without signal, which are in none."""

    tokens: np.ndarray  # (P,), trained
    rows: np.ndarray  # (P,), without those that only pad a shape
    all_tokens: int
    all_rows: int
    by_row: bool  # whether there is one ratio a row, not one a token


def over_tokens(values: np.ndarray, sizes: PartSizes) -> float:
    """The mean over trained tokens."""
    return (values * sizes.tokens).sum() / max(1, sizes.tokens.sum())


def over_rows(values: np.ndarray, sizes: PartSizes) -> float:
    """The mean over rows."""
    return (values * sizes.rows).sum() / max(1, sizes.rows.sum())


def over_ratios(values: np.ndarray, sizes: PartSizes) -> float:
    """A share of the ratios: a row that was left out for want of signal is never clipped, and counts."""
    if sizes.by_row:
        return (values * sizes.rows).sum() / max(1, sizes.all_rows)
    return (values * sizes.tokens).sum() / max(1, sizes.all_tokens)


def lowest(values: np.ndarray, sizes: PartSizes) -> float:
    """The least share in a row; one left out for want of signal has 0, one without tokens has none."""
    all_there = sizes.rows.sum() == sizes.all_rows and sizes.tokens.any()
    return values[sizes.tokens > 0].min() if all_there else 0.0


def highest(values: np.ndarray, sizes: PartSizes) -> float:
    return values.max()


def added(values: np.ndarray, sizes: PartSizes) -> float:
    """The sum, of what a micro-batch has divided by the step's size already."""
    return values.sum()


METRICS = {  # of every loss
    "kl": over_tokens,
    "entropy": over_tokens,
    "entropy_trained": added,
    "mismatch/mean": over_tokens,
    "mismatch/kl": over_tokens,
    "mismatch/max": highest,
}
CLIP_METRICS = {
    "clip_ratio/low_mean": over_ratios,
    "clip_ratio/high_mean": over_ratios,
    "clip_ratio/region_mean": over_ratios,
    "clip_ratio/low_min": lowest,
    "clip_ratio/high_max": highest,
}


def clip_metrics(x: Tokens, low: mx.array, high: mx.array, by_row: bool) -> dict[str, mx.array]:
    """TRL's: shares of what is clipped below and above, and the least and the most of them in a row.

    low, high: bool, (N, T), or (N, 1) with by_row.
    """
    share = mx.mean if by_row else x.mean
    low_row, high_row = (low, high) if by_row else (x.row_mean(low), x.row_mean(high))  # (N, 1)
    present = mx.ones_like(low_row) if by_row else x.lengths  # a row without tokens has no share
    least = mx.where(present > 0, low_row, 1.0).min()
    return {
        "clip_ratio/low_mean": share(low),
        "clip_ratio/high_mean": share(high),
        "clip_ratio/region_mean": share(low | high),
        "clip_ratio/low_min": mx.where(present.sum() > 0, least, 0.0),
        "clip_ratio/high_max": mx.where(present > 0, high_row, 0.0).max(),
    }


def surrogate_metrics(x: Tokens, clip_eps, clip_eps_high, delta) -> dict[str, mx.array]:
    """What the clip holds back: ratios that are low where A < 0, or high where A > 0."""
    low = (x.ratio < 1 - clip_eps) & (x.advantages < 0)
    return clip_metrics(x, low, (x.ratio > 1 + clip_eps_high) & (x.advantages > 0), x.by_row)


def geometric_metrics(x: Tokens, clip_eps, clip_eps_high) -> dict[str, mx.array]:
    """The same of single tokens, in log space."""
    low = (x.log_ratio < -clip_eps) & (x.advantages < 0)
    return clip_metrics(x, low, (x.log_ratio > clip_eps_high) & (x.advantages > 0), by_row=False)


def weight_metrics(x: Tokens, clip_eps_high) -> dict[str, mx.array]:
    """The share of tokens, or rows, whose weight is clipped."""
    clipped = (x.ratio > clip_eps_high) & (x.advantages > 0)
    return {"cispo_clip_ratio": clipped.mean() if x.by_row else x.mean(clipped)}


def gamma_metrics(x: Tokens, **options) -> dict[str, mx.array]:
    """The mean weight of a row."""
    return {"vespo/phi_seq_mean": gamma_weight(x, **options).mean()}


def no_metrics(x: Tokens, **options) -> dict[str, mx.array]:
    return {}


@dataclass(frozen=True)
class Loss:
    """An objective: the term of a token, what divides the sum of the terms, and what it logs."""

    term: Callable  # (Tokens, **options) -> (N, T), or (N, 1) for one a row
    divisor: Callable  # (sums over each row (N, 1), lengths (N, 1), StepSizes) -> scalar
    options: tuple[str, ...] = ()  # settings that `term` and `measure` take
    measure: Callable = no_metrics  # (Tokens, **options) -> scalars by name
    metrics: dict[str, Callable] = field(default_factory=dict)  # how each is merged over micro-batches
    whole_rows: bool = False  # its weight is a whole row's: importance_sampling_level has no say
    corrects_itself: bool = False  # a sampler correction goes into its weight, not onto its term

    @property
    def sums_tokens(self) -> bool:
        """Whether long rows weigh more because they have more tokens."""
        return self.divisor in (mean_of_tokens, mean_of_generation_tokens, by_constant)


CLIP = ("clip_eps", "clip_eps_high", "delta")
LOSSES = {
    "grpo": Loss(clipped_surrogate, mean_of_row_means, CLIP, surrogate_metrics, CLIP_METRICS),
    "bnpo": Loss(clipped_surrogate, mean_of_tokens, CLIP, surrogate_metrics, CLIP_METRICS),
    "dr_grpo": Loss(clipped_surrogate, by_constant, CLIP, surrogate_metrics, CLIP_METRICS),
    "dapo": Loss(clipped_surrogate, mean_of_generation_tokens, CLIP, surrogate_metrics, CLIP_METRICS),
    "cispo": Loss(
        clipped_weight, mean_of_generation_tokens, ("clip_eps_high",),
        weight_metrics, {"cispo_clip_ratio": over_ratios},
    ),
    "sapo": Loss(sigmoid_gate, mean_of_row_means, ("sapo_temperature_pos", "sapo_temperature_neg")),
    "luspo": Loss(clipped_surrogate, mean_of_row_sums, CLIP, surrogate_metrics, CLIP_METRICS),
    "vespo": Loss(
        gamma_weighted, mean_of_generation_tokens,
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        gamma_metrics, {"vespo/phi_seq_mean": over_rows}, whole_rows=True, corrects_itself=True,
    ),
    "gmpo": Loss(
        geometric_mean, mean_of_row_means, ("clip_eps", "clip_eps_high"),
        geometric_metrics, CLIP_METRICS, whole_rows=True,
    ),
}  # fmt: skip


def grpo_loss(
    logps, old_logps, advantages, mask, *,
    ref_logps=None, sampler_logps=None, entropies=None,
    loss_type="grpo", importance_sampling_level="token",
    clip_eps=0.2, clip_eps_high=None, delta=None,
    kl_coeff=0.0, max_completion_length=None, num_items=None, use_bias_correction_kl=False,
    top_entropy_quantile=1.0, entropy_coef=0.0, off_policy_mask_threshold=None,
    sampler_correction=None, sampler_correction_min=None, sampler_correction_max=3.0,
    sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    entropy_mask=None, totals=None,
):  # fmt: skip
    """The objective: a scalar loss and a dict of scalar metrics.

    logps, old_logps, ref_logps, sampler_logps, entropies and mask are (N, T): nats, and 1 on trained
    positions; advantages is (N,), or (N, T). old_logps None means logps with the gradient stopped. num_items
    is the mask's sum over the whole generation batch, for the losses that divide by it. Only logps and
    entropies carry a gradient.

    For a micro-batch, totals are the whole step's {"rows", "tokens", "entropy_tokens"} (StepSizes): the loss
    is then its part, and the parts add up to the step's. entropy_mask (N, T) replaces the top-entropy mask,
    whose quantile is the whole step's. entropy_coef may be an array, where it changes between steps.
    """
    check_objective(loss_type, importance_sampling_level, sampler_correction)
    loss = LOSSES[loss_type]
    stop = mx.stop_gradient
    mask = mask.astype(mx.float32)
    inside = mask > 0

    def clean(values):  # padding may hold anything, and inf * 0 is not 0
        return mx.where(inside, values, 0.0)

    logps = clean(logps)
    old_logps = stop(logps) if old_logps is None else clean(old_logps)
    correction = None
    if sampler_correction and sampler_logps is not None:
        log_mismatch = clean(old_logps - sampler_logps)
        bounds = sampler_correction_min, sampler_correction_max
        correction = correction_weights(log_mismatch, mask, sampler_correction, *bounds)
    if entropy_mask is None:
        entropy_mask = top_entropy_mask(entropies, inside, top_entropy_quantile)
    by_row = importance_sampling_level == "sequence"
    advantages = advantages[:, None] if advantages.ndim == 1 else clean(advantages)
    x = Tokens(logps, logps - old_logps, by_row, advantages, mask, mask * entropy_mask, correction)
    totals = totals or {"rows": len(mask), "tokens": mask.sum(), "entropy_tokens": x.kept.sum()}
    generation = totals["tokens"] if num_items is None else num_items
    step = StepSizes(**totals, generation_tokens=generation, longest=max_completion_length or mask.shape[1])

    given = {
        "clip_eps": clip_eps, "delta": delta,
        "clip_eps_high": clip_eps if clip_eps_high is None else clip_eps_high,
        "sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg,
        "vespo_k_pos": vespo_k_pos, "vespo_lambda_pos": vespo_lambda_pos,
        "vespo_k_neg": vespo_k_neg, "vespo_lambda_neg": vespo_lambda_neg,
    }  # fmt: skip
    options = {name: given[name] for name in loss.options}
    metrics = loss.measure(x, **options)

    # The policy's term, with two masks and the sampler's correction, none of which applies to the KL.
    keep = x.kept > 0
    if off_policy_mask_threshold is not None:  # drop rows with A < 0 that the policy likes less
        sampled = old_logps if sampler_logps is None else sampler_logps
        gap = x.row_mean(clean(sampled - stop(logps)))  # (N, 1)
        keep = keep & ((advantages >= 0) | (gap <= off_policy_mask_threshold))
    terms = mx.where(keep, loss.term(x, **options), 0.0)  # (N, T)
    if correction is not None and not loss.corrects_itself:
        terms = terms * correction
    if kl_coeff > 0:
        kl = k3(clean(ref_logps) - logps) * (x.ratio if use_bias_correction_kl else 1.0)
        terms = terms + kl_coeff * kl
        metrics["kl"] = x.mean(kl)
    value = loss.divisor((terms * mask).sum(axis=1, keepdims=True), x.lengths, step)

    if isinstance(entropy_coef, mx.array) or entropy_coef > 0:
        # The mean over trained tokens for every loss, so that the coefficient means the same for all.
        trained = (clean(entropies) * x.kept).sum() / mx.maximum(step.entropy_tokens, 1)
        value = value - entropy_coef * trained
        metrics["entropy_trained"] = trained
    if entropies is not None:
        metrics["entropy"] = x.mean(clean(entropies))
    return value, {name: stop(metric) for name, metric in metrics.items()}


def check_objective(loss_type: str, importance_sampling_level: str, sampler_correction: str | None) -> None:
    """Raise ValueError for names that are none, and a correction that the loss cannot take."""
    if loss_type not in LOSSES or importance_sampling_level not in CHOICES["importance_sampling_level"]:
        names = f"loss_type {loss_type!r}, importance_sampling_level {importance_sampling_level!r}"
        raise ValueError(f"Unknown objective: {names}")
    if LOSSES[loss_type].corrects_itself and sampler_correction in SEQUENCE_CORRECTIONS:
        raise ValueError(f"loss_type {loss_type} takes a correction by token, not {sampler_correction!r}")


def k3(log_gap: mx.array) -> mx.array:
    """exp(g) - g - 1 of g = ref - policy: an unbiased estimate of the KL, never negative (GRPO, eq. 4).

    Held at g = 20, so that it is finite.
    """
    log_gap = mx.minimum(log_gap, 20.0)
    return mx.exp(log_gap) - log_gap - 1


def top_entropy_mask(entropies: mx.array | None, inside: mx.array, share: float):
    """Whether a token is of the `share` with the highest entropies, the forking tokens (2506.01939)."""
    if share >= 1:
        return 1.0
    return entropies >= masked_quantile(mx.stop_gradient(entropies), inside, 1 - share)


def masked_quantile(values: mx.array, inside: mx.array, q: float) -> mx.array:
    """The q-quantile of the values inside the mask, linear between neighbours."""
    ordered = mx.sort(mx.where(inside, values, mx.inf).reshape(-1))
    place = q * mx.maximum(inside.sum() - 1, 0)
    low = mx.floor(place).astype(mx.int32)
    high = mx.minimum(low + 1, mx.maximum(inside.sum().astype(mx.int32) - 1, 0))
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def correction_weights(log_ratio, mask, mode: str, low: float | None, high: float | None) -> mx.array:
    """Weights that undo the sampler's mismatch: exp(old - sampler), a token or summed over a row.

    The gradient is stopped. log_ratio: (N, T), 0 outside the mask -> (N, T), or (N, 1) for a row's. truncate:
    limited to [low, high] (truncated importance sampling); mask: 0 outside it.
    """
    if mode in SEQUENCE_CORRECTIONS:
        log_ratio = (log_ratio * mask).sum(axis=1, keepdims=True)
    weight = mx.exp(mx.clip(mx.stop_gradient(log_ratio), -20.0, 20.0))
    floor = 0.0 if low is None else low
    ceiling = mx.inf if high is None else high
    if mode in ("token_truncate", "sequence_truncate"):
        return mx.clip(weight, floor, ceiling)
    return mx.where((weight >= floor) & (weight <= ceiling), weight, 0.0)


def mismatch_metrics(logps: mx.array, sampler_logps: mx.array, mask: mx.array) -> dict[str, mx.array]:
    """How far the sampler's log-probs (N, T) are from the training forward's, of the same tokens: nats.

    With gap = policy - sampler: mean and largest |gap|, and the KL to the policy by k3, exp(gap) - gap - 1.
    """
    gap = mx.where(mask > 0, logps - sampler_logps, 0.0)
    tokens = mx.maximum(mask.sum(), 1)
    return {
        "mismatch/mean": mx.abs(gap).sum() / tokens,
        "mismatch/kl": k3(gap).sum() / tokens,
        "mismatch/max": mx.abs(gap).max(),
    }


def merge_metrics(parts: list[dict], merges: dict[str, Callable], sizes: PartSizes) -> dict[str, float]:
    """A step's metrics from those of its micro-batches on all ranks, each merged as `merges` says."""
    return {name: float(merges[name](np.array([part[name] for part in parts]), sizes)) for name in parts[0]}


def next_entropy_coef(coef: float, entropy: float, config: MLXGRPOConfig) -> float:
    """The coefficient of the next step's bonus, after a step whose trained tokens had this entropy in nats.

    Up by entropy_coef_delta where the entropy is at most the target, else down, within the bounds
    (Skywork-OR1, arXiv 2505.22312; TRL's use_adaptive_entropy).
    """
    change = config.entropy_coef_delta if entropy <= config.entropy_target else -config.entropy_coef_delta
    return min(max(coef + change, config.entropy_coef_min), config.entropy_coef_max)


# ------------------------------------------------------------------------------------------------------------
# Log-probs of completions
# ------------------------------------------------------------------------------------------------------------


class CompletionLogProbs:
    """Log-probs and entropies of given completions under a model, at the sampling temperature.

    A group's prompt is computed once, forward and backward, and its caches are repeated for the group's rows.
    Models that do not allow that take whole sequences instead, with the same result.
    """

    def __init__(self, model, temperature: float, entropy_gradient=True, head_chunk=HEAD_CHUNK_LOGITS):
        self.model = model
        self.temperature = temperature
        self.share_prompts = not reason_not_to_share(model)
        # CUDA's fused attention takes no mask: there a padded prompt costs more than it saves.
        self.shares_padded = self.share_prompts and not on_cuda()
        self.split = split_head(model)
        if self.split:
            chunk = max(1, head_chunk // model(mx.array([[0]])).shape[-1])
            self.head_stats = make_head_stats(
                self.split[1], self.split[0], temperature, chunk, entropy_gradient
            )

    def __call__(self, batch: dict) -> tuple[mx.array, mx.array]:
        """Log-probs and entropies, (N, T) each, of a batch.

        batch: prompts (P, L), left-padded by pads (P,) if given, and ids (N, T), right-padded. N is a
        multiple of P: each prompt has N/P rows.
        """
        prompts = batch["prompts"]
        pads = batch.get("pads")
        ids = batch["ids"]
        repeats = ids.shape[0] // prompts.shape[0]
        run = self.split[0] if self.split else self.model
        if self.shares_padded or (self.share_prompts and pads is None):
            cache = shared_prompts.prefill(self.model, prompts, pads, repeats)
            # The last prompt id predicts the first of the completion, and so on: T inputs for T ids.
            inputs = mx.concatenate([mx.repeat(prompts[:, -1:], repeats, axis=0), ids[:, :-1]], axis=1)
            out = run(inputs, cache=cache)  # (N, T, D), or (N, T, V) from a model without a split head
        else:
            rows = mx.concatenate([mx.repeat(prompts, repeats, axis=0), ids], axis=1)  # (N, L+T)
            first = prompts.shape[1] - 1  # position whose output predicts the first completion id
            length = ids.shape[1]  # T
            if pads is None:
                out = run(rows)[:, first : first + length]
            else:  # move padding from the left to the right: causal attention then needs no mask
                starts = rows.shape[1] * mx.arange(len(rows))[:, None]  # (N, 1), in the flat array
                shift = mx.repeat(pads, repeats)[:, None]  # (N, 1)
                rows = rows.reshape(-1)[(starts + shift + mx.arange(rows.shape[1])) % rows.size]
                out = run(rows)
                out = out.reshape(-1, out.shape[-1])[starts - shift + first + mx.arange(length)]
        if self.split:
            logps, entropies = self.head_stats(out.reshape(-1, out.shape[-1]), ids.reshape(-1))
            return logps.reshape(ids.shape), entropies.reshape(ids.shape)
        logits = out.astype(mx.float32) / self.temperature
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropies = -(mx.exp(logits) * logits).sum(axis=-1)
        return mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0], entropies


# ------------------------------------------------------------------------------------------------------------
# Optimizer
# ------------------------------------------------------------------------------------------------------------


class MasterAdamW(optim.AdamW):
    """AdamW with bias correction, in float32 whatever the weights are.

    bfloat16 keeps 8 bits: at a learning rate of 1e-6 nearly every step would be rounded away. So the
    optimizer's state keeps a float32 copy of each half-precision weight, and the weight is that copy rounded.
    """

    def __init__(self, config: MLXGRPOConfig):
        betas = [config.adam_beta1, config.adam_beta2]
        super().__init__(0.0, betas, weight_decay=config.weight_decay, bias_correction=True)

    def init_single(self, parameter, state):
        if parameter.dtype != mx.float32:
            state["master"] = parameter.astype(mx.float32)
        super().init_single(state.get("master", parameter), state)

    def apply_single(self, gradient, parameter, state):
        updated = super().apply_single(gradient.astype(mx.float32), state.get("master", parameter), state)
        if "master" in state:
            state["master"] = updated
        return updated.astype(parameter.dtype)


def gradient_norm(grads) -> float:
    """The global norm, in float32, of a tree of gradients."""
    exact = [g.astype(mx.float32) for _, g in tree_flatten(grads)]
    squares = sum((g * g).sum() for g in exact)  # g * g: ten times faster than MLX's square on CPUs
    return mx.sqrt(squares).item()


def learning_rate(config: MLXGRPOConfig, update: int, updates: int) -> float:
    """Learning rate of update 0, 1, .. updates-1: linear warm-up to the peak, then lr_scheduler_type's shape.

    linear and cosine go down to 0, which the update after the last would have.
    """
    warmup = math.ceil(config.warmup_ratio * updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    done = (update - warmup) / max(1, updates - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shape[config.lr_scheduler_type]


# ------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------


def wilson_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson, 1927)."""
    if not n:
        return 0.0, 1.0
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def fixed_subset(rows: list, size: int, seed: int) -> list:
    """`size` of the rows (0: all), chosen by a generator of its own: the same ones at every evaluation."""
    if not size or size >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng([seed, 1]).choice(len(rows), size, replace=False))]


def mean_interval(values: np.ndarray, full: float | None = None) -> tuple[float, float]:
    """95% interval of the mean of n >= 1 values.

    Wilson's where each value is 0 or `full` (above 0; 1 if not given), else the normal one.
    """
    full = full if full and full > 0 else 1.0
    n = len(values)
    if np.isin(values, (0.0, full)).all():
        low, high = wilson_interval(int((values == full).sum()), n)
        return full * low, full * high
    mean = float(values.mean())
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    return mean - half, mean + half


def reward_scores(rewards: np.ndarray, names: list[str], weights: list[float]) -> dict:
    """Means over rewards (F, n): reward_mean, of the weighted totals, and rewards/NAME, of each function.

    Each has its interval beside it. Abstentions (NaN) do not count.
    """
    scores = {}
    alone = ALL_OR_NOTHING.get(names[0], 1.0) * weights[0] if len(names) == 1 else None
    rows = [("reward_mean", alone, total_rewards(rewards, weights))]
    rows += [(f"rewards/{name}", ALL_OR_NOTHING.get(name), values) for name, values in zip(names, rewards)]
    for key, full, values in rows:
        known = values[~np.isnan(values)]
        scores[key] = float(known.mean()) if known.size else None
        scores[f"{key}_ci"] = mean_interval(known, full) if known.size else None
    return scores


def exact_match(texts: list[str], golds: list[str]) -> dict:
    """em_strict (answer tags required) and em_lenient (the last number counts) with their intervals."""
    hits = np.array([grade(text, gold) for text, gold in zip(texts, golds)])  # (n, 2)
    strict, lenient = (int(h) for h in hits.sum(axis=0))
    n = len(texts)
    return {
        "em_strict": strict / n, "em_strict_ci": wilson_interval(strict, n),
        "em_lenient": lenient / n, "em_lenient_ci": wilson_interval(lenient, n),
    }  # fmt: skip


EVALUATION_ROWS = 32  # an evaluation's rows at a time are at least this many


def evaluate(
    model, tokenizer, rows: list[dict], config: MLXGRPOConfig,
    progress=None, ranks: Ranks = ALONE, decoder=None, rewards=None,
) -> dict:  # fmt: skip
    """Greedy answers to `rows` ({"prompt", "answer", ..}): their rewards, exact match and texts.

    rewards: (functions, weights) as load_rewards returns them; None for the config's. Raises RunError where a
    reward function fails.
    """
    functions, weights = rewards or load_rewards(config, BUILT_IN_REWARDS)
    mine = ranks.share(rows)
    limit = config.eval_max_new_tokens or config.max_completion_length
    prompts = [build_prompt(tokenizer, r["prompt"], *config.prompting) for r in mine]
    # As many rows as a rollout has on this rank, so that it takes no more memory.
    most_rows = max(EVALUATION_ROWS, config.batch_size * config.num_generations // ranks.size)
    completions = generate(
        model, tokenizer, prompts, sampling=Sampling(temperature=0.0), max_new_tokens=limit,
        stop_strings=config.stops, prefix=config.completion_prefix, progress=progress, decoder=decoder,
        kv_budget=int(config.kv_budget_gb * 2**30), most_rows=most_rows,
    )  # fmt: skip
    groups = [Group(row, ids, [completion]) for row, ids, completion in zip(mine, prompts, completions)]
    try:
        score_groups(groups, functions, config.reward_timeout, limit)
        answers = [[completion.text, len(completion.ids), completion.rewards] for completion in completions]
    except RunError as error:  # on one rank: merge raises it on all
        answers = error
    texts, lengths, scores = zip(*ranks.merge(answers))
    cut = cut_while_thinking(texts)
    return {
        **reward_scores(np.array(scores).T, names_of(functions), weights),
        **exact_match(texts, [row["answer"] for row in rows]),
        "n": len(rows), "completion_length": float(np.mean(lengths)), "texts": list(texts),
        **({} if cut is None else {"cut_thinking": cut}),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Update
# ------------------------------------------------------------------------------------------------------------


def policy_loss(
    config: MLXGRPOConfig, batch: dict, logps: mx.array, entropies: mx.array
) -> tuple[mx.array, dict]:
    """Loss and metrics of a micro-batch, of the policy's log-probs and entropies (N, T) each."""
    options = {name: getattr(config, name) for name in OBJECTIVE_OPTIONS} | {
        "sampler_correction": config.correction,
        "entropy_coef": batch.get("entropy_coef", config.entropy_coef),
    }
    old_logps = batch.get("old_logps", mx.stop_gradient(logps))
    if "on_policy" in batch:  # where True, the old policy is this one: the ratio is exactly 1
        old_logps = mx.where(batch["on_policy"], mx.stop_gradient(logps), old_logps)
    loss, metrics = grpo_loss(
        logps, old_logps, batch["advantages"], batch["mask"], ref_logps=batch.get("ref_logps"),
        sampler_logps=batch["sampler_logps"], entropies=entropies, entropy_mask=batch.get("entropy_mask"),
        totals=batch["totals"], **options,
    )  # fmt: skip
    return loss, metrics | mismatch_metrics(old_logps, batch["sampler_logps"], batch["mask"])


OBJECTIVE_OPTIONS = tuple(name for name in grpo_loss.__kwdefaults__ if name in FIELD_TYPES)

# A micro-batch's arrays with one row a completion.
ROW_ARRAYS = ("ids", "mask", "advantages", "sampler_logps", "old_logps", "ref_logps", "entropy_mask")
# Metrics that are 0 in an update without a forward pass; those of the loss are too.
IDLE_METRICS = ("loss", "grad_norm", "kl", "entropy", "mismatch/mean", "mismatch/kl", "mismatch/max")


class Learner:
    """One optimizer step: log-probs, the gradient of a loss over micro-batches, clipping, AdamW.

    loss: (batch, logps (N, T), entropies (N, T)) -> loss, metrics. ref_model: for the KL, or None.
    """

    def __init__(self, model, ref_model, loss, config: MLXGRPOConfig, ranks: Ranks, memory_limit: int):
        self.model = model
        self.config = config
        self.ranks = ranks
        self.memory_limit = memory_limit
        # In float32 the head's logits take at most a 64th of the limit.
        self.head_chunk = min(HEAD_CHUNK_LOGITS, memory_limit // 256) // stream_count()
        self.log_probs = CompletionLogProbs(
            model, config.temperature, config.has_entropy_bonus, self.head_chunk
        )
        self.ref_log_probs = None
        if ref_model is not None:
            self.ref_log_probs = CompletionLogProbs(ref_model, config.temperature, head_chunk=self.head_chunk)
        self.optimizer = MasterAdamW(config)
        self.optimizer.init(model.trainable_parameters())
        self.shapes = {}  # of micro-batches: what decides which are compiled (note_shapes)
        self.gradient, self.apply = self.build(loss)

    def build(self, loss):
        """The two functions of a step: a micro-batch's gradient, and the optimizer's part."""
        config = self.config

        def loss_and_stats(batch):
            stats = self.log_probs(batch)
            return loss(batch, *stats)[0], stats

        def apply(grads, scale):
            self.optimizer.update(self.model, tree_map(lambda g: g * scale.astype(g.dtype), grads))

        loss_and_gradient = nn.value_and_grad(self.model, loss_and_stats)
        if config.use_compile and not compile_works():
            print("use_compile is off: on Linux CPUs it needs g++, which is not installed")
        elif config.use_compile:
            if not on_cuda():  # one shape, and many small operations; on CUDA its kernels take 20 s to build
                both = [self.model.state, self.optimizer.state]
                apply = mx.compile(apply, both, both)
            if compiling_pays():
                loss_and_gradient = CompiledShapes(loss_and_gradient, [self.model.state], lambda: self.shapes)

        def gradient(batch):
            (value, stats), grads = loss_and_gradient(batch)
            # Metrics are not compiled (on CUDA each kernel costs seconds), and leave padding rows out.
            rows = batch["rows"].item()
            real = {name: x[:rows] if name in ROW_ARRAYS else x for name, x in batch.items()}
            metrics = loss(real, *(x[:rows] for x in stats))[1]
            if "on_policy" in batch:  # for the steps that follow on this batch
                batch["old_logps"] = mx.where(batch["on_policy"], stats[0], batch["old_logps"])
                batch["on_policy"] = mx.array(False)
            return value, metrics, grads

        return gradient, apply

    def set_optimizer(self, state: dict) -> None:
        """Replace the optimizer's state in place: the compiled step refers to the same tree."""
        held = self.optimizer.state
        state = dict(state)  # a copy: it may be the tree that is cleared next
        held.clear()
        held.update(state)
        self.optimizer.init(self.model.trainable_parameters())  # fills in branches that a file leaves out

    def prepare(self, groups: list[Group], advantages: np.ndarray) -> list[dict]:
        """This rank's micro-batches, with ref_logps, old_logps, entropy_mask (N, T) as the loss needs them.

        advantages: (B, G). old_logps and entropy_mask are of the policy as it was before the first of
        num_iterations steps. The forward pass of that step gives old_logps; only where something is needed
        earlier is there an extra forward pass.
        """
        config = self.config
        self.model.train()  # models with kernels for inference alone switch to what has a gradient
        batches = micro_batches(groups, advantages, config, self.ranks, self.log_probs.shares_padded)
        if self.ref_log_probs:
            for batch, (logps, _) in zip(batches, run_on_streams(self.ref_log_probs, batches)):
                batch["ref_logps"] = logps
        entropies = []
        needs_policy = config.top_entropy_quantile < 1 or config.estimator.tokens
        for batch in batches if config.num_iterations > 1 or needs_policy else ():
            batch["old_logps"] = mx.zeros_like(batch["mask"])  # set by the first step's forward
            batch["on_policy"] = mx.array(True)
        if needs_policy:
            for batch, (logps, found) in zip(batches, run_on_streams(self.log_probs, batches)):
                batch["old_logps"] = logps
                entropies.append(found)
        if config.top_entropy_quantile < 1:
            self.mask_low_entropies(batches, entropies)
        if config.estimator.tokens:
            for batch in batches:
                given = batch["advantages"], batch["old_logps"], batch.get("ref_logps"), batch["mask"]
                batch["advantages"] = config.estimator.tokens(*given)
        return batches

    def mask_low_entropies(self, batches: list[dict], entropies: list[mx.array]) -> None:
        """Give each batch its part of the step's top-entropy mask, and the number of tokens in the whole."""
        inside = [batch["mask"] > 0 for batch in batches]
        mine = [np.array(values)[np.array(trained)].tolist() for values, trained in zip(entropies, inside)]
        values = mx.array([value for part in self.ranks.gather(sum(mine, [])) for value in part])
        threshold = masked_quantile(values, mx.ones_like(values) > 0, 1 - self.config.top_entropy_quantile)
        kept = (values >= threshold).sum()
        for batch, found in zip(batches, entropies):
            batch["entropy_mask"] = found >= threshold
            batch["totals"] = {**batch["totals"], "entropy_tokens": kept}

    def step(self, batches: list[dict], rate: float, entropy_coef: float) -> dict:
        """One optimizer step on the sum of the micro-batches' gradients, at this learning rate; its metrics.

        "skipped" among them says why no weight was changed.
        """
        grads = None
        parts = []
        if self.config.use_adaptive_entropy:
            for batch in batches:
                batch["entropy_coef"] = mx.array(entropy_coef)
        for batch, value, metrics, part in run_on_streams(
            lambda batch: (batch, *self.gradient(batch)), batches
        ):
            # Parts are added in float32: in half precision small ones would be lost.
            grads = part if grads is None else tree_map(lambda a, b: a.astype(mx.float32) + b, grads, part)
            sizes = {"tokens": batch["mask"].sum(), "rows": batch["rows"], "totals": batch["totals"]}
            parts.append({"loss": value, "metrics": metrics, **sizes})
            mx.async_eval(grads, parts[-1])
            del part  # free these gradients before the next micro-batch
        # A rank may have no micro-batch.
        grads = self.ranks.sum(grads or tree_map(mx.zeros_like, self.model.trainable_parameters()))
        norm = gradient_norm(grads)
        mine = tree_map(lambda x: x.item() if isinstance(x, mx.array) else x, parts)
        parts = [part for rank in self.ranks.gather(mine) for part in rank]
        record = {"loss": sum(part["loss"] for part in parts), "grad_norm": norm, "lr": rate}
        record |= self.step_metrics(parts)
        if self.config.use_adaptive_entropy:
            record["entropy_coef"] = entropy_coef
        if not math.isfinite(norm) or not math.isfinite(record["loss"]):
            finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
            return finite | {"skipped": "non-finite gradient"}
        if norm == 0:  # every row with an advantage is masked
            return record | {"skipped": "no signal"}
        limit = self.config.max_grad_norm
        self.optimizer.learning_rate = rate
        self.apply(grads, mx.array(min(1.0, limit / (norm + 1e-6)) if limit else 1.0))
        mx.eval(self.model.state, self.optimizer.state)
        return record

    def step_metrics(self, parts: list[dict]) -> dict[str, float]:
        """The step's metrics from those of its micro-batches on all ranks."""
        config = self.config
        sizes = PartSizes(
            tokens=np.array([part["tokens"] for part in parts]),
            rows=np.array([part["rows"] for part in parts]),
            all_tokens=parts[0]["totals"]["tokens"],
            all_rows=parts[0]["totals"]["rows"],
            by_row=config.importance_sampling_level == "sequence" and not config.objective.whole_rows,
        )
        return merge_metrics([part["metrics"] for part in parts], METRICS | config.objective.metrics, sizes)

    def idle_step(self, rate: float) -> dict:
        """The record of a step that is left out because no group has a signal.

        Such a step would be harmful: Adam would blow rounding noise up to a full step.
        """
        idle = dict.fromkeys([*IDLE_METRICS, *self.config.objective.metrics], 0.0)
        return {**idle, "lr": rate, "skipped": "no signal"}

    def probe_memory(self, rows: list[dict], groups: int) -> None:
        """One gradient at the largest possible micro-batch, so that too little memory fails at the start.

        rows: of the prompts. groups: of an update.
        """
        longest = max((row["prompt_ids"] for row in rows), key=len)
        length = self.config.rollout_tokens
        prompt = [0] * (grid(len(longest)) - len(longest)) + longest  # padded as in training
        completion = Completion([0] * length, [0.0] * length, [1] * length, "eos", "")
        mx.eval(self.optimizer.state)
        # Printed first: where memory is short, Linux kills the process without a message.
        print(f"probe      the longest batch, {len(longest)} + {length} tokens a row: ", end="", flush=True)
        self.trial_gradient([Group({}, prompt, [completion] * self.config.num_generations)] * groups)
        print(f"{mx.get_peak_memory() / 2**30:.2f} GB at the peak", flush=True)

    def try_gradient(self, groups: list[Group]) -> float:
        """trial_gradient. Raises RunError where it is not finite."""
        norm = self.trial_gradient(groups)
        if not math.isfinite(norm):
            raise RunError(
                "NaN gradient encountered: in the first backward pass; "
                "load the model in float32, or check its weights"
            )
        return norm

    def trial_gradient(self, groups: list[Group]) -> float:
        """The norm of a gradient that is thrown away, with made-up advantages: one micro-batch a stream."""
        made_up = np.linspace(-1, 1, self.config.num_generations, dtype=np.float32)
        batches = self.prepare(groups, np.tile(made_up, (len(groups), 1)))[: stream_count()]
        return gradient_norm([part for _, _, part in run_on_streams(self.gradient, batches)])


# ------------------------------------------------------------------------------------------------------------
# Trainer
# ------------------------------------------------------------------------------------------------------------


class OldPolicy:
    """model_old, the model that samples: the policy itself, or a copy if it is to be stale or quantised."""

    def __init__(self, policy, config: MLXGRPOConfig):
        self.policy = policy
        self.config = config
        self.quantize = config.quantize_for_rollouts
        self.model = self.decoder = None
        self.weights = {}  # the trainable arrays that a stale copy was made from
        self.refresh()

    def refresh(self, weights: dict | None = None) -> None:
        """Bring it up to the policy as it is now, or as it was with these trainable arrays."""
        model = self.policy
        if self.quantize or self.config.sync_every > 1:
            model = self.copy(weights)
        kept = (
            self.model is not None
            and self.model is not self.policy
            and parameter_names(self.model) == parameter_names(model)
        )
        if kept:
            self.model.update(model.parameters())  # the decoder stays, with what it has compiled
        elif model is not self.model:
            self.model = model
            self.decoder = fast_decoder(model) if self.config.use_compile else Decoder(model)

    def decoder_at(self, update: int) -> Decoder | None:
        """The decoder of the next rollout and evaluation: None, for plain MLX, until a run has been long.

        CUDA's fast decoder takes about 10 s to build and saves as much in FAST_AFTER positions: a short run
        never builds it. Positions are counted as if every completion were the longest possible, so that a
        resumed run changes decoders where an uninterrupted one does.
        """
        positions = update // self.config.num_iterations * self.config.rollout_tokens
        return self.decoder if positions >= FAST_AFTER else None

    def stop_quantising(self) -> None:
        """Sample in full precision from here on, since the gradient was not finite."""
        print("NaN gradient encountered: rollouts are in full precision from here on", file=sys.stderr)
        self.quantize = False
        self.refresh(self.weights)

    def copy(self, weights: dict | None):
        """The policy, adapters merged; quantised where rollouts are to be."""
        config = self.config
        now = trainable_arrays(self.policy)
        weights = weights or now
        self.weights = weights if config.sync_every > 1 else {}
        self.policy.load_weights(list(weights.items()), strict=False)
        copied = fused(self.policy)
        self.policy.load_weights(list(now.items()), strict=False)
        if self.quantize:
            nn.quantize(
                copied, config.group_size, config.bits,
                class_predicate=lambda _, module: is_divisible(module, config.group_size),
            )  # fmt: skip
        mx.eval(copied.parameters())
        return copied


def rows_digest(rows: list[dict]) -> str:
    """A hash that changes with any value of any row, and with their order."""
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def weights_digest(model) -> str:
    """A hash that changes with any bit of the base model's weights; adapters are left out."""
    own = {name for name, _ in tree_flatten(model.trainable_parameters())} if adapter_layers(model) else ()
    arrays = narrowed(model, dict(tree_flatten(model.parameters())))  # in the dtype of its files
    parts = [f"{name} {digest(array)}" for name, array in arrays.items() if name not in own]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def input_digests(rows: list[dict], eval_rows: list[dict], model, files: list[Path]) -> dict[str, str]:
    """What a run reads, by name: a resumed run must read the same."""
    return {
        "the training data": rows_digest(rows),
        "the held-out data": rows_digest(eval_rows),
        "the base model": weights_digest(model),
        **{f"the reward file {file}": file_digest(file) for file in files},
    }


def trainable_arrays(model) -> dict[str, mx.array]:
    """The trainable arrays by name, as they are now."""
    return dict(tree_flatten(model.trainable_parameters()))


def parameter_names(model) -> list[str]:
    return [name for name, _ in tree_flatten(model.parameters())]


def is_divisible(module, group_size: int) -> bool:
    """Whether a layer can be quantised in groups of this size."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


@dataclass
class RunState:
    """Where a run is: all that a resume needs besides weights and optimizer. Random keys derive from it."""

    update: int = 0  # optimizer updates done or skipped
    cursor: int = 0  # prompts drawn from the data, or passed over
    passed_easy: int = 0  # prompts passed over because they were all right lately
    passed_hard: int = 0  # or all wrong
    difficulty: dict = field(default_factory=dict)  # outcomes of prompts, by row; never changed in place
    lowest_reward: float = 0.0  # of a completion so far, where difficulty is kept; at most 0
    highest_reward: float = 0.0  # at least 0
    tokens: int = 0  # completion tokens sampled
    nan_updates: int = 0  # with a non-finite gradient, in a row
    flat_updates: int = 0  # without signal, in a row
    changed_updates: int = 0  # that changed a weight
    skipped: dict = field(default_factory=dict)  # updates left out, by reason; never changed in place
    said_no_signal: int = 0  # update of the last warning that there is no signal; 0 for none
    quantize_rollouts: bool = False  # off for good after a non-finite gradient
    entropy_coef: float = 0.0  # as use_adaptive_entropy has it now
    last_entropy: float = 1e9  # nats a trained token, of the last update
    best: float = -1e9  # the best held-out score so far, by metric_for_best_model
    best_update: int = 0  # and when
    before: dict = field(default_factory=dict)  # the evaluations before the first update
    shapes: dict = field(default_factory=dict)  # of micro-batches: which are compiled (note_shapes)

    @classmethod
    def first(cls, config: MLXGRPOConfig) -> "RunState":
        """Of a run that has not begun."""
        return cls(quantize_rollouts=config.quantize_for_rollouts, entropy_coef=config.entropy_coef)

    def bonus(self, config: MLXGRPOConfig) -> float:
        """The entropy bonus's coefficient in the next step."""
        if not config.use_adaptive_entropy:
            return config.entropy_coef
        return self.entropy_coef if self.last_entropy <= config.entropy_target else 0.0

    def note(self, record: dict, config: MLXGRPOConfig) -> None:
        """Count an update, and remember what the next one needs of it."""
        self.update += 1
        reason = record.get("skipped")
        failed = reason == "non-finite gradient"
        self.nan_updates = self.nan_updates + 1 if failed else 0
        self.flat_updates = self.flat_updates + 1 if reason == "no signal" else 0
        if reason:
            self.skipped = {**self.skipped, reason: self.skipped.get(reason, 0) + 1}
        elif record["lr"] > 0:
            self.changed_updates += 1
        if config.use_adaptive_entropy and not failed and "entropy_trained" in record:
            self.last_entropy = record["entropy_trained"]
            self.entropy_coef = next_entropy_coef(self.entropy_coef, self.last_entropy, config)

    def draw(self, rows: list[dict], config: MLXGRPOConfig, count: int) -> list[tuple[int, dict]]:
        """(number, row) of the next `count` prompts, on which the cursor moves past them."""
        if not config.draws_by_difficulty:
            drawn = draw_rows(rows, config.seed, self.cursor, count)
            self.cursor += count
            return drawn
        numbers, passed = draw_by_difficulty(rows, config, self.difficulty, self.cursor, count)
        self.cursor = numbers[-1] + 1
        self.passed_easy += passed.count("easy")
        self.passed_hard += passed.count("hard")
        return [(number, rows[row_of(number, len(rows), config.seed)]) for number in numbers]

    def drawn_since(self, start: "RunState") -> dict[str, int]:
        """For the log: how many prompts were sampled since `start`, and passed over, where any may be."""
        easy = self.passed_easy - start.passed_easy
        hard = self.passed_hard - start.passed_hard
        passed = {"prompts/skipped_easy": easy, "prompts/skipped_hard": hard} if self.difficulty else {}
        return {"prompts_drawn": self.cursor - start.cursor - easy - hard, **passed}

    def note_difficulty(
        self, drawn: list[tuple[int, dict]], rewards, advantages, rows: int, config: MLXGRPOConfig
    ) -> None:
        """Remember how the groups of these prompts went.

        rewards, advantages: (B, G). rows: the number of training rows.
        """
        known = rewards[~np.isnan(rewards)].tolist()
        self.lowest_reward = min([self.lowest_reward, *known])
        self.highest_reward = max([self.highest_reward, *known])
        bounds = (self.lowest_reward, self.highest_reward)
        outcomes = [
            (row_of(number, rows, config.seed), outcome(of_group, signal, *bounds))
            for (number, _), of_group, signal in zip(drawn, rewards, advantages.any(axis=1))
        ]
        self.difficulty = remembered(self.difficulty, outcomes, config.difficulty_window)

    def note_evaluation(self, record: dict, metric: str) -> None:
        """Remember the best held-out score, and when it was.

        metric: the field of the record that counts; it is None there where nothing was scored.
        """
        score = record.get(metric)
        if record["split"] == "test" and score is not None and score > self.best:
            self.best = score
            self.best_update = self.update

    @classmethod
    def read(cls, plain: dict) -> "RunState":
        """From a checkpoint's plain data. Raises TypeError or ValueError where that is not a RunState's."""
        state = cls(**plain)
        if any(type(value) is not type(getattr(cls(), name)) for name, value in vars(state).items()):
            raise ValueError("a value of another type")
        return state


def merged_groups(ranks: Ranks, rows: list[dict], mine: list[Group] | RunError) -> list[Group]:
    """The groups of all ranks, in the order of `rows`. Raises RunError where one rank has failed."""
    failed = isinstance(mine, RunError)
    parts = mine if failed else [[vars(completion) for completion in group.completions] for group in mine]
    merged = ranks.merge(parts)
    return [
        Group(row, row["prompt_ids"], [Completion(**one) for one in completions])
        for row, completions in zip(rows, merged)
    ]


class Stopwatch:
    """Seconds by phase of an update."""

    def __init__(self):
        self.seconds = {"rollout": 0.0, "reward": 0.0, "train": 0.0}

    @contextlib.contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


@contextlib.contextmanager
def keeping_what_is_learnt(state: RunState, save):
    """Where a reward fails, restore the state and save() what is learnt: a resume scores the same prompts."""
    start = dataclasses.replace(state)
    try:
        yield
    except RunError:
        if state.update == start.update:  # no weight has changed since the prompts were drawn
            vars(state).update(vars(start))
        if state.update:
            save()
        raise


class RunFiles:
    """A run on disk: logs, checkpoints, final model. Rank 0 reads and writes, and sends to the others.

    writer: writes the policy as it is at the time. inputs: digests of what the run reads.
    """

    def __init__(
        self, run_dir: Path, learner: Learner, old_policy: OldPolicy,
        writer: ModelWriter, inputs: dict[str, str],
    ):  # fmt: skip
        self.run_dir = run_dir
        self.learner = learner
        self.old_policy = old_policy
        self.writer = writer
        self.inputs = inputs
        self.config = learner.config
        self.ranks = learner.ranks
        self.logs = RunLogs(run_dir, self.config.log_jsonl and self.ranks.rank == 0)
        self.checkpoints = Checkpoints(run_dir, self.config.save_total_limit)

    def check_weights(self, state: RunState) -> None:
        """Raise RunError if the ranks' weights have diverged."""
        self.ranks.check_equal(trainable_arrays(self.learner.model), f"after update {state.update}")

    def save_final(self) -> None:
        self.ranks.on_first(lambda: write_directory(self.run_dir / "final", self.writer.write_model))

    def save_checkpoint(self, state: RunState, may_fail: bool) -> None:
        """Write checkpoint-UPDATE, with all that an exact resume needs.

        may_fail: whether the run goes on where the disk refuses, since a later checkpoint will follow.
        """
        self.check_weights(state)

        def write(folder: Path) -> None:
            logs = self.logs.sync()
            self.writer.write_checkpoint(folder)
            settings = dataclasses.asdict(self.config)
            optimizer = with_masters(self.learner.model, self.learner.optimizer.state)
            stale = self.old_policy.weights
            plain = dataclasses.asdict(state)
            write_snapshot(folder, Snapshot(plain, settings, logs, self.inputs, {}, optimizer, stale))

        self.ranks.on_first(lambda: self.checkpoints.write(state.update, state.best_update, write, may_fail))

    def resume(self, folder: Path, asked: set[str], accept_inputs: bool) -> RunState:
        """Take over a checkpoint as if there had been no stop; only rank 0 needs the files. Raises UserError.

        asked: settings given by --set, which may differ. accept_inputs: whether data, model and rewards may.
        """
        plain = self.ranks.on_first(lambda: dataclasses.asdict(self.restore(folder, asked, accept_inputs)))
        state = RunState(**plain)
        if self.ranks.size > 1:
            model = self.learner.model
            model.load_weights(list(self.ranks.from_first(trainable_arrays(model)).items()), strict=False)
            self.learner.set_optimizer(self.ranks.from_first(self.learner.optimizer.state))
            self.old_policy.quantize = state.quantize_rollouts
            self.old_policy.refresh(self.ranks.from_first(self.old_policy.weights))
        return state

    def restore(self, folder: Path, asked: set[str], accept_inputs: bool) -> RunState:
        """Load what a checkpoint holds, and set aside what the run wrote after it."""
        snapshot = read_snapshot(folder)
        trainable = trainable_arrays(self.learner.model)
        try:
            state = RunState.read(snapshot.state)
            if any(snapshot.weights[name].shape != now.shape for name, now in trainable.items()):
                raise ValueError("a weight of another shape")
            weights, optimizer = without_masters(self.learner.model, snapshot.weights, snapshot.optimizer)
        except (TypeError, ValueError, KeyError):
            raise UserError(not_resumable(folder)) from None
        changed = changed_settings(snapshot.config, dataclasses.asdict(self.config), asked, folder)
        changed |= changed_inputs(snapshot.inputs, self.inputs, accept_inputs, folder)
        self.learner.model.load_weights(list(weights.items()), strict=False)
        self.learner.set_optimizer(optimizer)
        self.old_policy.quantize = state.quantize_rollouts
        self.old_policy.refresh(snapshot.stale)
        self.checkpoints.set_aside_after(state.update, state.best_update)
        self.logs.cut(snapshot.logs)
        if changed:
            self.logs.add("training_log", {"event": "resume", "update": state.update, "changed": changed})
        return state


def count_updates(config: MLXGRPOConfig, rows: int, ranks: int) -> int:
    """Updates of a run on so many prompts. Raises UserError where an update has none for some rank."""
    if config.prompts_per_update < ranks:
        raise UserError(
            f"{ranks} ranks share {config.prompts_per_update} prompts an update; "
            "raise batch_size, or start fewer"
        )
    return max(1, int(config.num_epochs * rows / config.prompts_per_update)) * config.num_iterations


class MLXGRPOTrainer:
    """GRPO (DeepSeekMath, Algorithm 1) with the settings of `config`, into the directory `run_dir`.

    model: the policy. model_old: what samples, the policy itself unless it is to be quantised or stale.
    ref_model: the policy at the start, for the KL, or None. Each of `ranks` takes its share of the prompts.
    """

    def __init__(self, config: MLXGRPOConfig, run_dir: Path, ranks: Ranks = ALONE):
        self.config, self.run_dir, self.ranks = config, Path(run_dir), ranks
        self.reward_functions, self.reward_weights = load_rewards(config, BUILT_IN_REWARDS)
        source = resolve_model(config.model_name)  # looked up once: a save must not depend on the hub
        splits = {split: load_dataset_split(config, split) for split in ("train", "test")}
        self.model, self.tokenizer = load_model(config)
        special = special_tokens(self.tokenizer)
        if ranks.rank == 0:
            warn_of_rows(config, special, training=splits["train"], held_out=splits["test"])
        self.rows, self.eval_rows = prompt_rows(splits, self.model, self.tokenizer, config)
        self.updates = count_updates(config, len(self.rows), ranks.size)

        # Queued MLX work keeps its buffers alive: above this, MLX waits for queued work.
        memory_limit = int(config.memory_limit_gb * 2**30) or memory_bytes() // 2
        mx.set_memory_limit(memory_limit)
        self.ref_model = reference_copy(self.model) if config.kl_coeff > 0 else None
        self.learner = Learner(
            self.model, self.ref_model, self.compute_grpo_loss, config, ranks, memory_limit
        )
        rows = math.ceil(config.prompts_per_update / ranks.size) * config.num_generations
        self.old_policy = OldPolicy(self.model, config)
        compiled = compiled_shapes(self.old_policy.decoder, config.use_compile, self.updates)
        self.work = work_of(self.learner, {len(row["prompt_ids"]) for row in self.rows}, rows, compiled)
        self.state = RunState.first(config)
        self.learner.shapes = self.state.shapes
        writer = ModelWriter(self.model, self.tokenizer, read_model_config(source), source, config)
        inputs = input_digests(self.rows, self.eval_rows["test"], self.model, reward_files(config))
        self.files = RunFiles(self.run_dir, self.learner, self.old_policy, writer, inputs)
        self.monitor = Monitor(self.updates, config.logging_steps, metric=config.best_metric)
        self.signal = SignalWatch(config, self.rows, self.monitor.say, self.files.logs)
        self.after_evaluation = no_report  # the command line puts write_report here
        self.stop_signal = 0
        ranks.must_agree(settings=dataclasses.asdict(config), data=list(inputs.items())[:2])
        ranks.check_equal(dict(tree_flatten(self.model.parameters())), "as loaded")

    @property
    def model_old(self):
        return self.old_policy.model

    # One update

    def train_step(self) -> list[dict]:
        """Algorithm 1, lines 4 to 11, for one batch of prompts: num_iterations updates, a log record each."""
        config, watch, start = self.config, Stopwatch(), dataclasses.replace(self.state)
        groups = self.rollout(config.prompts_per_update, watch)
        for _ in range(config.dynamic_sampling_max_batches):  # DAPO: new prompts for groups without signal
            useful = [group for group in groups if self.advantages([group])[1].any()]
            if len(useful) == len(groups):
                break
            groups = useful + self.rollout(len(groups) - len(useful), watch)
        rewards, advantages = self.advantages(groups)  # (B, G) each

        self.monitor.phase("training")
        with watch.phase("train"):
            metrics = self.train_on(groups, advantages)
        if is_due(self.state.update - len(metrics), self.state.update, config.sync_every):
            self.old_policy.refresh()
        if is_due(self.state.update - len(metrics), self.state.update, config.check_weights_steps):
            self.files.check_weights(self.state)
        drawn = self.state.drawn_since(start)
        return self.report(groups, rewards, advantages, metrics, watch.seconds, drawn)

    def rollout(self, count: int, watch: Stopwatch) -> list[Group]:
        """Complete and score the next `count` prompts."""
        drawn = self.state.draw(self.rows, self.config, count)
        groups = self.sample_groups(drawn, watch)
        if self.config.draws_by_difficulty:
            self.state.note_difficulty(drawn, *self.advantages(groups), len(self.rows), self.config)
        return groups

    def sample_groups(self, drawn: list[tuple[int | str, dict]], watch: Stopwatch) -> list[Group]:
        """Complete and score each (number, row), each rank its share; every rank gets all the groups."""
        try:
            with watch.phase("rollout"):
                mine = self.generate_responses(self.ranks.share(drawn))
            with watch.phase("reward"):
                self.compute_rewards(mine)
        except RunError as error:  # a reward failed, on one rank
            mine = error
        return merged_groups(self.ranks, [row for _, row in drawn], mine)

    def generate_responses(self, drawn: list[tuple[int | str, dict]]) -> list[Group]:
        """num_generations completions by model_old of each (number, row)."""
        config = self.config
        self.model_old.eval()
        completions = generate(
            self.model_old, self.tokenizer, [row["prompt_ids"] for _, row in drawn],
            sampling=config.sampling, decoder=self.old_policy.decoder_at(self.state.update),
            max_new_tokens=config.rollout_tokens, num_generations=config.num_generations,
            stop_strings=config.stops, prefix=config.completion_prefix,
            keys=[random_key(config.seed, "rollout", number) for number, _ in drawn],
            kv_budget=int(config.kv_budget_gb * 2**30),
        )  # fmt: skip
        size = config.num_generations
        return [
            Group(row, row["prompt_ids"], completions[i * size : (i + 1) * size])
            for i, (_, row) in enumerate(drawn)
        ]

    def compute_rewards(self, groups: list[Group]) -> None:
        """Score every completion by every reward function; NaN where a function abstains."""
        config = self.config
        score_groups(groups, self.reward_functions, config.reward_timeout, config.max_completion_length)

    def advantages(self, groups: list[Group]) -> tuple[np.ndarray, np.ndarray]:
        """Each completion's reward and advantage, (B, G) each."""
        nested = [[completion.rewards for completion in group.completions] for group in groups]
        each = np.array(nested)  # (B, G, F)
        rewards, advantages = combine_rewards(each.transpose(2, 0, 1), self.reward_weights, self.config)
        return rewards, np.array(advantages)

    def train_on(self, groups: list[Group], advantages: np.ndarray) -> list[dict]:
        """num_iterations optimizer steps on one batch of groups; the metrics of each. advantages: (B, G)."""
        config, state, metrics = self.config, self.state, []
        idle = not advantages.any() and config.estimator.tokens is None
        batches = [] if idle else self.learner.prepare(groups, advantages)
        note_shapes(state.shapes, batches, state.update)
        for _ in range(config.num_iterations):
            rate, learner = learning_rate(config, state.update, self.updates), self.learner
            metrics.append(
                learner.idle_step(rate) if idle else learner.step(batches, rate, state.bonus(config))
            )
            state.note(metrics[-1], config)
        if state.nan_updates and state.quantize_rollouts:
            self.old_policy.stop_quantising()
            state.quantize_rollouts = False
        return metrics

    def compute_grpo_loss(self, batch: dict, logps: mx.array, entropies: mx.array) -> tuple[mx.array, dict]:
        return policy_loss(self.config, batch, logps, entropies)

    # The run

    def check_signal(self) -> tuple[list[Group], dict]:
        """A few prompts, sampled with keys of their own: their groups, and a record if they earn nothing."""
        rows = fixed_subset(self.rows, min(CHECKED_PROMPTS, self.config.prompts_per_update), self.config.seed)
        groups = self.sample_groups([(f"check {i}", row) for i, row in enumerate(rows)], Stopwatch())
        return groups, self.signal.check(names_of(self.reward_functions), groups, *self.advantages(groups))

    def train(self) -> dict:
        """Train to the end. Returns the evaluations before and after, or {} when stopped."""
        state = self.state
        self.learner.probe_memory(self.rows, self.config.prompts_per_update)
        with self.monitor as monitor:
            monitor.begin(state.update, state.before.get("test"))
            if not state.before:
                monitor.phase("checking")
                self.files.logs.add("training_log", *filter(None, self.check_signal()[1:]))
                state.before = {split: self.evaluate_em(split) for split in self.eval_rows}
            while state.update < self.updates and not self.is_stopped():
                previous = state.update
                monitor.phase("sampling")
                with keeping_what_is_learnt(state, self.save_checkpoint):
                    records = self.train_step()
                self.files.logs.add("training_log", *records)
                for record in records:
                    monitor.update(record)
                self.stop_where_nothing_is_learnt(previous)
                if state.update < self.updates:  # the last update's are made below
                    self.evaluate_and_save(previous)
            if self.is_stopped():
                self.save_checkpoint()
                return {}
            self.signal.end(state)
            after = {split: self.evaluate_em(split) for split in self.eval_rows}
            monitor.phase("saving")
            self.files.save_final()
        return {"before": state.before, "after": after}

    def evaluate_and_save(self, previous: int) -> None:
        """The evaluations and the checkpoint that are due after the updates since `previous`."""
        config, update = self.config, self.state.update
        for split, every in (("test", config.eval_steps), ("train", config.eval_every_updates)):
            if is_due(previous, update, every):
                self.evaluate_em(split)
        is_best = config.save_steps and self.state.best_update == update
        if is_due(previous, update, config.save_steps) or is_best:
            self.save_checkpoint()

    def stop_where_nothing_is_learnt(self, previous: int) -> None:
        """Save and raise RunError where gradients failed, or there was no signal, for too long."""
        if reason := why_stop(self.state, self.state.update - previous, self.config):
            self.save_checkpoint()
            self.signal.end(self.state)
            self.after_evaluation(self.run_dir)
            raise RunError(f"{reason}. Saved in {self.run_dir}. {nothing_learnt(self.state)}".rstrip())

    def request_stop(self, number: int) -> None:
        self.stop_signal = number  # of the signal that asks for it: the update finishes and is saved

    def is_stopped(self) -> bool:
        """Whether any rank has been told to stop; all of them then do."""
        self.stop_signal = max(self.ranks.gather(self.stop_signal))
        return bool(self.stop_signal)

    def evaluate_em(self, split: str) -> dict:
        """Evaluate on a fixed part of a split, log and show it, and note the best held-out score."""
        start, state, rows = time.perf_counter(), self.state, self.eval_rows[split]
        ends = {0: "before training", self.updates: "after training"}
        when = ends.get(state.update, f"update {state.update}")
        self.monitor.evaluating(len(rows), when)
        self.model.eval()
        rewards = self.reward_functions, self.reward_weights
        shared = self.old_policy.decoder_at(state.update) if self.model_old is self.model else None
        with keeping_what_is_learnt(state, self.save_checkpoint):
            given = {"ranks": self.ranks, "decoder": shared, "rewards": rewards}
            result = evaluate(self.model, self.tokenizer, rows, self.config, **given)
        del result["texts"]
        record = {"event": "eval", "update": state.update, "split": split, **result}
        timed = {**record, "seconds": time.perf_counter() - start}
        self.files.logs.add("training_log", timed)
        state.note_evaluation(record, self.config.best_metric)
        self.monitor.evaluation(timed, when)
        self.after_evaluation(self.run_dir)
        return record

    def report(
        self, groups: list[Group], rewards, advantages, metrics: list[dict], seconds: dict, drawn: dict
    ):
        """The log records of the updates just made; samples are shown where they are due."""
        state, names = self.state, names_of(self.reward_functions)
        previous, every = state.update - len(metrics), self.config.log_completions_steps
        if every and (not previous or is_due(previous, state.update, every)):
            samples = completion_records(state.update, groups, names)
            self.files.logs.add("completions", *samples)
            self.monitor.completions(samples, rewards)
        seconds, exchanges = self.ranks.timing(seconds)
        facts = update_facts(groups, rewards, advantages, names)
        facts |= time_facts(groups, seconds, drawn["prompts_drawn"], metrics) | drawn | exchanges
        state.tokens += facts.pop("sampled")
        facts |= {"epoch": round(state.cursor / len(self.rows), 4), "total_tokens": state.tokens}
        self.signal.after_updates(state, names, groups, rewards)
        return [{"update": previous + i, "kl": 0.0, **one, **facts} for i, one in enumerate(metrics, 1)]

    def save_checkpoint(self) -> None:
        self.files.save_checkpoint(self.state, may_fail=not self.stop_signal)

    def resume(self, folder: Path, asked: set[str] = frozenset(), accept_inputs: bool = False) -> None:
        """Continue from a checkpoint as if there had been no stop (RunFiles.resume)."""
        self.state = self.files.resume(folder, asked, accept_inputs)
        self.learner.shapes = self.state.shapes


def no_report(run_dir: Path) -> None:
    """What a trainer does after an evaluation where nothing else is asked for."""


def is_due(previous: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (previous, now]; never for 0."""
    return bool(every) and previous // every < now // every


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


MAIN_SETTINGS = """\
the settings met first (docs/CONFIG_GUIDE.md has all, with their defaults):
  model       model_name, fine_tune_type, lora_parameters
  data        dataset, prompt_field, answer_field, max_train_samples
  rewards     reward_funcs, reward_weights
  rollout     batch_size, num_generations, max_completion_length, temperature
  objective   loss_type, clip_eps, kl_coeff, scale_rewards, num_iterations
  optimiser   learning_rate, num_epochs, micro_batch_tokens, grad_checkpoint
  output      output_dir, run_name, eval_steps, save_steps, report_to
"""  # --help as a whole fits one screen, 24 lines of 80 columns


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlx-grpo.py",
        description="Train a small language model by Group Relative Policy Optimization.",
        epilog=MAIN_SETTINGS,
        add_help=False,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=80
        ),
    )
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--config", metavar="FILE", help="TOML file; else $MLX_GRPO_CONFIG, else the quickstart"
    )
    settings.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[],
        help="one setting, over the file's; repeatable",
    )  # fmt: skip
    running = parser.add_argument_group("running")
    running.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, train nothing"
    )
    running.add_argument(
        "--resume", metavar="CHECKPOINT", nargs="?", const="",
        help="go on from the newest checkpoint, or this one",
    )  # fmt: skip
    running.add_argument(
        "--accept-changed-inputs", action="store_true",
        help="resume though data, model or reward files differ",
    )  # fmt: skip
    running.add_argument("-h", "--help", action="help", help="show this")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks; the exit status."""
    quickstart = ROOT / "configs" / "quickstart.toml"
    path = Path(arguments.config or os.environ.get("MLX_GRPO_CONFIG") or quickstart).expanduser()
    values, sources = read_settings(FIELD_TYPES, path, arguments.set)
    config = MLXGRPOConfig(**values)
    check_trackers(config.report_to)
    with start_ranks(config.distributed_timeout) as ranks:
        return run_on(ranks, arguments, path, config, sources)


def run_on(
    ranks: Ranks, arguments: argparse.Namespace, path: Path, config: MLXGRPOConfig, sources: dict
) -> int:
    """Do what the command line asks, as one of `ranks`. Only the first uses the run's directory."""
    print_settings(config, sources)
    if sys.platform == "linux" and on_cpu() and not blas_name():
        print(
            "No OpenBLAS or MKL found: MLX is many times slower without. "
            "Install one: apt-get install libopenblas0, or uv pip install mkl"
        )
    run_dir, checkpoint = map(Path, ranks.on_first(lambda: find_run(config, path.stem, arguments.resume)))
    resumes = checkpoint != NO_CHECKPOINT
    trainer = MLXGRPOTrainer(config, run_dir, ranks)
    gc.freeze()  # what is loaded stays: garbage collection need not look at it
    print_plan(
        trainer.work, config, training=len(trainer.rows), held_out=len(trainer.eval_rows["test"]),
        updates=trainer.updates, ranks=ranks.size,
        ways=plan_lines(trainer.learner, trainer.old_policy.model, trainer.old_policy.decoder),
    )  # fmt: skip
    if arguments.dry_run:
        dry_run(trainer.learner, trainer.check_signal()[0][: ranks.size], trainer.work)
        return 0

    with contextlib.ExitStack() as held:
        with failing_on_the_disk(run_dir):
            ranks.on_first(lambda: held.enter_context(claimed_directory(run_dir)) and None)
            if not resumes:  # a log that is here is of a run that ended before its first checkpoint
                ranks.on_first(lambda: trainer.files.logs.cut({}))
            if resumes:
                asked = {name for name, source in sources.items() if source == "--set"}
                trainer.resume(checkpoint, asked, arguments.accept_changed_inputs)
                print(f"Resumed    {checkpoint}, update {trainer.state.update} of {trainer.updates}")
            ranks.on_first(lambda: describe_run(run_dir, config, sources, trainer.updates))
        if ranks.rank == 0:
            trainer.after_evaluation = write_report if config.log_jsonl else trainer.after_evaluation
            trackers = start_trackers(
                config.report_to, run_dir, dataclasses.asdict(config), trainer.state.update
            )
            trainer.monitor.trackers = held.enter_context(trackers)
        held.enter_context(
            stopping_on_signals(trainer.request_stop, trainer.monitor, with_hangup=ranks.size > 1)
        )
        outcome = trainer.train()
    if not outcome:
        print(
            f"Stopped at update {trainer.state.update} of {trainer.updates}. "
            "To continue, run the same command with --resume",
            file=sys.stderr,
        )
        return 128 + trainer.stop_signal
    print_outcome(run_dir, outcome, nothing_learnt(trainer.state))
    return 0


NO_CHECKPOINT = Path("")


def dry_run(learner: Learner, groups: list[Group], work: Work) -> None:
    """One backward pass on the groups of the check before training; nothing is written, no weight changes."""
    norm = learner.try_gradient(groups)
    print("to fit     " + "\n           ".join(suggestions(work)))
    tokens = sum(len(completion.ids) for group in groups for completion in group.completions)
    print(f"dry run    {tokens} tokens in one backward pass (gradient norm {norm:.3g}): all well")


def print_settings(config: MLXGRPOConfig, sources: dict) -> None:
    """Print the settings that differ from their defaults, a line each, then the defaults as one paragraph."""
    lines = config_as_toml(config, sources).splitlines()
    print("\n".join(line for line in lines if not line.endswith("# default")))
    unchanged = [line.removesuffix("  # default") for line in lines if line.endswith("# default")]
    defaults = "defaults: " + ", ".join(line.removeprefix("# ") for line in unchanged)
    print(textwrap.fill(defaults, min(100, shutil.get_terminal_size((100, 24)).columns)))


def find_run(config: MLXGRPOConfig, name: str, resume: str | None) -> tuple[str, str]:
    """The run's directory, and the checkpoint that --resume goes on from or "". Raises UserError."""
    run_dir = choose_run_dir(Path(config.output_dir), config.run_name, name, resume)
    if links := [entry for entry in run_dir.glob("*") if entry.is_symlink()]:
        raise UserError(
            f"Run directory holds a link, which would lead writes elsewhere: {links[0]}. "
            "Put in its place what it points to"
        )
    return str(run_dir), str(resume is not None and find_checkpoint(run_dir, resume) or "")


def claimed_directory(run_dir: Path):
    """Lock the run's directory for this process, and remove what a killed save has left in it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = lock_directory(run_dir)
    for left_over in [*run_dir.glob(".*.partial"), *run_dir.glob(".*.removed")]:
        shutil.rmtree(left_over)
    return lock


def describe_run(run_dir: Path, config: MLXGRPOConfig, sources: dict, updates: int) -> None:
    """Write the run's settings and the machine it runs on."""
    (run_dir / "config.resolved.toml").write_text(config_as_toml(config, sources))
    (run_dir / "settings.json").write_text(json.dumps(settings_record(config, sources), indent=2))
    machine = {**machine_facts(memory_bytes()), "updates": updates}
    (run_dir / "machine.json").write_text(json.dumps(machine, indent=2))


@contextlib.contextmanager
def failing_on_the_disk(run_dir: Path):
    """Raise RunError where the run's directory cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(f"Cannot write to the run directory {run_dir}: {error.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except RunError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, (OSError, TimeoutError)):
            import traceback

            traceback.print_exception(error.__cause__, file=sys.stderr)  # of the user's reward function
        print(error, file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        words = "allocat|out of memory|insufficient memory"
        if not isinstance(error, MemoryError) and not re.search(words, str(error), re.IGNORECASE):
            raise
        print(f"Out of memory: {' '.join(str(error).split())}. {LESS_MEMORY}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
