"""Settings: read from a TOML file and key=value overrides, checked, and written back with their origins."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from pathlib import Path

from mlx_grpo.run.trackers import TRACKERS
from mlx_grpo.errors import UserError

BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def coerce(name: str, value, kind, from_text: bool):
    """`value` as the field type `kind`.

    Text from `--set` is parsed; a TOML value must be of the type already.

    Raises UserError with the contract's wording.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    base = typing.get_origin(kinds[0]) or kinds[0]
    items = typing.get_args(kinds[0]) if base is list else ()
    result = value
    try:
        if from_text and type(None) in kinds and value.strip().lower() in ("", "none", "null"):
            return None
        if from_text and base is bool:
            result = BOOLEANS[value.strip().lower()]
        elif from_text:
            result = tomllib.loads(f"value = {value}")["value"] if base in (list, dict) else base(value)
        if base is float and type(result) is int:
            result = float(result)
        if float in items:
            result = [float(item) if type(item) is int else item for item in result]
        if (
            type(result) is not base
            or result != result
            or any(type(item) not in items for item in items and result)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError):  # tomllib's error is a ValueError
        raise UserError(f"Failed to coerce value: {value!r} to {base} (for {name})") from None
    return result


def read_settings(kinds: dict, path: str | Path | None, overrides: list[str]) -> tuple[dict, dict]:
    """Settings from a TOML file (flat or under [mlx_grpo]) and `key=value` overrides, which win.

    kinds: types by name. Returns values by field and, by field, where each came from. Raises UserError for
    whatever is not a setting.
    """
    given = []
    if path:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"Config file not found: {path}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"Config file is not valid TOML: {path}: {error}") from None
        nested = table.pop("mlx_grpo", {})
        if not isinstance(nested, dict):
            raise UserError(f"Config file {path}: mlx_grpo must be a table, [mlx_grpo]")
        given += [(k, v, path.name, False) for k, v in {**table, **nested}.items()]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--set takes KEY=VALUE, not {override!r}")
        given.append((key.strip(), value, "--set", True))
    values, sources = {}, {}
    for key, value, source, from_text in given:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            raise UserError(f"Unknown config key: {key}" + (f" (did you mean {near[0]}?)" if near else ""))
        values[key] = coerce(key, value, kinds[key], from_text)
        sources[key] = source
    return values, sources


def inline_table(table: dict) -> str:
    """A dict as a TOML table on one line."""
    import tomli_w

    entries = [
        f"{json.dumps(k)} = {inline_table(v)}" if isinstance(v, dict) else tomli_w.dumps({k: v}).strip()
        for k, v in table.items()
    ]
    return "{" + ", ".join(entries) + "}"


def config_as_toml(config, sources: dict) -> str:
    """A resolved configuration (a dataclass), one line a field, each with where its value came from."""
    import tomli_w

    lines = []
    defaults = dataclasses.asdict(type(config)())
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):  # inline, so that every setting stays on its line
            text = f"{name} = {inline_table(value)}"
        elif isinstance(value, list):
            text = f"{name} = [{', '.join(tomli_w.dumps({'v': v}).strip()[4:] for v in value)}]"
        else:
            text = f"# {name} is unset" if value is None else tomli_w.dumps({name: value}).strip()
        default = json.dumps(defaults[name], ensure_ascii=False)  # JSON: TOML has no null
        lines.append(f"{text}  # {f'{sources[name]}; default {default}' if name in sources else 'default'}")
    return "\n".join(lines) + "\n"


def settings_record(config, sources: dict) -> dict[str, dict]:
    """Each setting's value, default and source, for the programs that read a run: settings.json."""
    defaults = dataclasses.asdict(type(config)())
    return {
        name: {"value": value, "default": defaults[name], "source": sources.get(name, "default")}
        for name, value in dataclasses.asdict(config).items()
    }


# --- What values may be -------------------------------------------------------------------------------------

CHOICES = {
    "fine_tune_type": ("auto", "full", "lora", "dora"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "sampler_correction": (
        "auto",
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "none",
    ),
    "lr_scheduler_type": ("cosine", "linear", "constant"),
    "bits": (2, 3, 4, 5, 6, 8),
    "group_size": (32, 64, 128),
}
SEQUENCE_CORRECTIONS = ("sequence_truncate", "sequence_mask")  # one weight a row, not one a token
AT_LEAST_ONE = (
    "batch_size", "max_prompt_length", "max_completion_length", "sync_every", "num_iterations",
    "logging_steps", "gradient_accumulation_steps", "micro_batch_tokens", "max_nan_updates",
    "eval_subset_size", "difficulty_window",
)  # fmt: skip
ABOVE_ZERO = (
    "temperature", "distributed_timeout", "num_epochs", "reward_timeout", "repetition_penalty",
    "eval_fraction", "top_p", "top_entropy_quantile", "easy_prompt_weight", "hard_prompt_weight",
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg",
)  # fmt: skip
AT_MOST_ONE = (
    "easy_prompt_weight",
    "hard_prompt_weight",
    "top_p",
    "min_p",
    "warmup_ratio",
    "top_entropy_quantile",
)
BELOW_ONE = ("adam_beta1", "adam_beta2", "eval_fraction")


def check_config(config, tables: dict[str, tuple]) -> None:
    """Raise UserError for a configuration that cannot work: values out of range, or contradictory ones.

    tables: choices of the settings that name an entry of a table.
    """
    for name, choices in (CHOICES | tables).items():
        if getattr(config, name) not in choices:
            raise UserError(
                f"Invalid {name}: {getattr(config, name)!r}; choose one of {', '.join(map(str, choices))}"
            )
    for name, value in vars(config).items():
        if type(value) not in (int, float):
            continue
        low = {"num_generations": 2, "num_layers": -1}.get(name, 1 if name in AT_LEAST_ONE else 0)
        if value < low or (value == 0 and name in ABOVE_ZERO) or value == math.inf:
            raise UserError(
                f"Invalid {name}: {value}; it must be "
                f"{'above 0' if name in ABOVE_ZERO else f'at least {low}'}"
            )
        if (value > 1 and name in AT_MOST_ONE) or (value >= 1 and name in BELOW_ONE):
            raise UserError(
                f"Invalid {name}: {value}; it must be {'below' if name in BELOW_ONE else 'at most'} 1"
            )
    for wrong, message in contradictions(config):
        if wrong:
            raise UserError(message)


def contradictions(config):
    """Yield (whether it is so, what to say of it) of each combination that makes no sense."""
    weights, functions = config.reward_weights, config.reward_funcs
    lora = config.fine_tune_type in ("lora", "dora")
    yield not functions, "reward_funcs is empty; name at least one reward function"
    yield (
        weights and len(weights) != len(functions),
        (
            f"reward_weights has {len(weights)} entries for {len(functions)} reward functions; give one for "
            "each"
        ),
    )
    yield not all(map(math.isfinite, weights)), f"reward_weights must be finite numbers, not {weights}"
    yield (
        config.max_new_tokens > config.max_completion_length,
        (
            f"max_new_tokens ({config.max_new_tokens}) is above max_completion_length "
            f"({config.max_completion_length})"
        ),
    )
    yield (
        config.lora_parameters.get("dropout"),
        (
            "lora_parameters.dropout must be 0: with dropout the policy would differ from itself between two "
            "passes"
        ),
    )
    yield (
        config.prompt_template and config.prompt_template.count("{prompt}") != 1,
        (f"prompt_template must hold {{prompt}} once, where the question goes: {config.prompt_template!r}"),
    )
    lora_numbers = [config.lora_parameters.get(name) for name in ("rank", "scale")]
    yield lora_numbers.count(None), "lora_parameters needs rank and scale, as in mlx-lm"
    yield (
        not all(type(n) in (int, float) and n > 0 for n in lora_numbers) or type(lora_numbers[0]) is not int,
        (
            "lora_parameters: rank must be a whole number and scale a number, both above 0, not "
            f"{lora_numbers}"
        ),
    )
    unknown = set(config.lora_parameters) - {"rank", "scale", "dropout", "keys"}
    yield (
        unknown,
        f"lora_parameters has unknown entries: {', '.join(sorted(unknown))}; mlx-lm knows rank, scale, "
        "dropout and keys",
    )
    yield (
        (config.sampler_correction_min or 0) > config.sampler_correction_max,
        (
            f"sampler_correction_min ({config.sampler_correction_min}) is above sampler_correction_max "
            f"({config.sampler_correction_max})"
        ),
    )
    yield (
        config.fine_tune_type == "full" and config.num_layers >= 0,
        "num_layers is for adapters; use fine_tune_type lora",
    )
    yield lora and config.num_layers == 0, "num_layers = 0 would train nothing; use -1 for all blocks"
    loss = config.objective
    yield (
        loss.corrects_itself and config.sampler_correction in SEQUENCE_CORRECTIONS,
        (
            f"loss_type {config.loss_type} takes a sampler correction into its weight token by token; "
            "set sampler_correction to token_truncate or token_mask"
        ),
    )
    yield (
        config.delta is not None and "delta" not in loss.options,
        (f"delta does nothing for loss_type {config.loss_type}"),
    )
    yield (
        loss.whole_rows and config.importance_sampling_level == "sequence",
        (
            f"loss_type {config.loss_type} works on whole sequences already; "
            "leave importance_sampling_level at token"
        ),
    )
    yield (
        config.entropy_coef_min > config.entropy_coef_max,
        (
            f"entropy_coef_min ({config.entropy_coef_min}) is above entropy_coef_max "
            f"({config.entropy_coef_max})"
        ),
    )
    yield (
        config.use_bias_correction_kl and not config.kl_coeff,
        "use_bias_correction_kl does nothing while kl_coeff is 0",
    )
    yield (
        config.multi_objective_aggregation == "normalize_then_sum" and config.scale_rewards != "group",
        (
            "normalize_then_sum scales each function by its group and their sum by the batch; leave "
            "scale_rewards at group"
        ),
    )
    yield (
        config.scale_rewards not in config.estimator.scales,
        (
            f"scale_rewards is for advantage_estimator group: {config.advantage_estimator} scales in its own "
            "way; leave it out"
        ),
    )
    by_function = config.multi_objective_aggregation == "normalize_then_sum"
    yield (
        by_function and config.advantage_estimator != "group",
        "normalize_then_sum takes each function's group advantages; leave advantage_estimator at group",
    )
    yield (
        config.difficulty_window > 1 and not config.draws_by_difficulty,
        "difficulty_window does nothing while easy_prompt_weight and hard_prompt_weight are 1",
    )
    named = [f"rewards/{name.rpartition(':')[2]}" for name in functions]
    metrics = ["reward_mean", *named, "em_strict", "em_lenient"]
    yield (
        config.metric_for_best_model not in ("", *metrics),
        (
            f"Invalid metric_for_best_model: {config.metric_for_best_model!r}; choose one of "
            f"{', '.join(metrics)}"
        ),
    )
    strange = [name for name in config.report_to if name not in TRACKERS]
    near = [f" (did you mean {n}?)" for name in strange for n in difflib.get_close_matches(name, TRACKERS, 1)]
    yield (
        strange,
        f"Invalid report_to: {', '.join(strange)}; choose from {', '.join(TRACKERS)}{''.join(near)}",
    )
    yield (
        "/" in config.run_name or config.run_name in (".", ".."),
        (f"run_name must be a plain name, not a path: {config.run_name!r}; use output_dir for the folder"),
    )


def doubts(config) -> list[str]:
    """Warnings of what works and is rarely meant."""
    found = []
    if config.sampling_filters:
        names = ", ".join(config.sampling_filters)
        found.append(f"{names} in force: completions are not drawn from the policy itself")
    if config.importance_sampling_level == "sequence" and config.objective.sums_tokens:
        found.append(
            f"with importance_sampling_level sequence, loss_type {config.loss_type} sums over tokens, so "
            "each sequence weighs by its length; GSPO's objective is loss_type grpo"
        )
    return found
