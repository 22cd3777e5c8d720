"""Settings: where they come from, what is refused, in which words, and that each one is used."""

import ast
import dataclasses
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

import mlx_grpo
from mlx_grpo import FIELD_TYPES, MLXGRPOConfig, UserError, config_as_toml, load_config, read_settings
from mlx_grpo.settings import coerce, doubts

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {f.name: f for f in dataclasses.fields(MLXGRPOConfig)}


@pytest.fixture
def toml(tmp_path):
    """Write a configuration file and return its path."""

    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def refused(monkeypatch, capsys):
    """Run the command line in this process: its exit status and the one line on stderr. No model may be loaded."""

    def loaded(*_, **__):
        raise AssertionError("a model or data set was loaded")

    for name in ("open_model", "load_model", "open_dataset"):
        monkeypatch.setattr(mlx_grpo.script, name, loaded)
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)

    def run(*arguments):
        status = mlx_grpo.main(list(map(str, arguments)))
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert error.count("\n") == 1, error
        return status, error.rstrip("\n")

    return run


# The contract's lines


def test_a_missing_config_file_is_named(refused, tmp_path):
    assert refused("--config", tmp_path / "absent.toml") == (2, f"Config file not found: {tmp_path / 'absent.toml'}")
    assert refused("--config", tmp_path) == (2, f"Config file not found: {tmp_path}")


@pytest.mark.parametrize(
    "key, nearest",
    [("learning_rat", "learning_rate"), ("lr_scheduler", "lr_scheduler_type"), ("batchsize", "batch_size"), ("num_generation", "num_generations"),
     ("clip_epsilon", "clip_eps"), ("kl_coef", "kl_coeff"), ("max_tokens", "max_new_tokens"), ("LEARNING_RATE", None), ("use-compile", "use_compile")],
)  # fmt: skip
def test_an_unknown_key_comes_with_the_nearest(refused, toml, key, nearest):
    line = f"Unknown config key: {key}" + (f" (did you mean {nearest}?)" if nearest else "")
    status, error = refused("--set", f"{key}=1")
    assert (status, error if nearest else error.split(" (")[0]) == (2, line)
    status, error = refused("--config", toml(f'"{key}" = 1'))
    assert (status, error if nearest else error.split(" (")[0]) == (2, line)


def test_a_key_like_no_other_is_refused_too(refused):
    status, error = refused("--set", "zzzzqqqq=1")
    assert status == 2 and error.startswith("Unknown config key: zzzzqqqq")


@pytest.mark.parametrize(
    "override, line",
    [
        ("learning_rate=fast", "Failed to coerce value: 'fast' to <class 'float'> (for learning_rate)"),
        ("learning_rate=", "Failed to coerce value: '' to <class 'float'> (for learning_rate)"),
        ("learning_rate=nan", "Failed to coerce value: 'nan' to <class 'float'> (for learning_rate)"),
        ("learning_rate=none", "Failed to coerce value: 'none' to <class 'float'> (for learning_rate)"),
        ("delta=much", "Failed to coerce value: 'much' to <class 'float'> (for delta)"),
        ("batch_size=4.5", "Failed to coerce value: '4.5' to <class 'int'> (for batch_size)"),
        ("batch_size=four", "Failed to coerce value: 'four' to <class 'int'> (for batch_size)"),
        ("use_compile=maybe", "Failed to coerce value: 'maybe' to <class 'bool'> (for use_compile)"),
        ("use_compile=2", "Failed to coerce value: '2' to <class 'bool'> (for use_compile)"),
        ("use_compile=", "Failed to coerce value: '' to <class 'bool'> (for use_compile)"),
        ("reward_funcs=int_reward_func", "Failed to coerce value: 'int_reward_func' to <class 'list'> (for reward_funcs)"),
        ("reward_funcs=[1]", "Failed to coerce value: '[1]' to <class 'list'> (for reward_funcs)"),
        ("reward_weights=[true]", "Failed to coerce value: '[true]' to <class 'list'> (for reward_weights)"),
        ("reward_weights=3", "Failed to coerce value: '3' to <class 'list'> (for reward_weights)"),
        ("lora_parameters=8", "Failed to coerce value: '8' to <class 'dict'> (for lora_parameters)"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_the_contracts_words(refused, override, line):
    assert refused("--set", override) == (2, line)


@pytest.mark.parametrize(
    "text, line",
    [
        ('learning_rate = "fast"', "Failed to coerce value: 'fast' to <class 'float'> (for learning_rate)"),
        ('learning_rate = "1e-5"', "Failed to coerce value: '1e-5' to <class 'float'> (for learning_rate)"),
        ("learning_rate = nan", "Failed to coerce value: nan to <class 'float'> (for learning_rate)"),
        ("learning_rate = true", "Failed to coerce value: True to <class 'float'> (for learning_rate)"),
        ("batch_size = 4.0", "Failed to coerce value: 4.0 to <class 'int'> (for batch_size)"),
        ("batch_size = true", "Failed to coerce value: True to <class 'int'> (for batch_size)"),
        ("use_compile = 1", "Failed to coerce value: 1 to <class 'bool'> (for use_compile)"),
        ("model_name = 3", "Failed to coerce value: 3 to <class 'str'> (for model_name)"),
        ('reward_funcs = "int_reward_func"', "Failed to coerce value: 'int_reward_func' to <class 'list'> (for reward_funcs)"),
        ('reward_weights = ["1"]', "Failed to coerce value: ['1'] to <class 'list'> (for reward_weights)"),
        ("lora_parameters = []", "Failed to coerce value: [] to <class 'dict'> (for lora_parameters)"),
        ("[learning_rate]", "Failed to coerce value: {} to <class 'float'> (for learning_rate)"),
    ],
)
def test_toml_values_must_have_their_type(refused, toml, text, line):
    assert refused("--config", toml(text)) == (2, line)


@pytest.mark.parametrize("override", ["learning_rate", "", "=", "=1"])
def test_what_is_no_assignment_is_refused(refused, override):
    status, error = refused("--set", override)
    assert status == 2 and error.startswith(("--set takes KEY=VALUE", "Unknown config key"))


@pytest.mark.parametrize(
    "text, place",
    [("a = 1\nb = = 2\n", "line 2, column 5"), ("learning_rate = fast\n", "line 1, column 17"), ("seed = 1\nseed = 2\n", "line 2"), ("x = [1,\n", "end of document")],
)
def test_broken_toml_is_named_with_line_and_column(refused, toml, text, place):
    path = toml(text)
    status, error = refused("--config", path)
    assert status == 2 and error.startswith(f"Config file is not valid TOML: {path}: ") and place in error


def test_a_config_that_is_not_text_is_refused(refused, tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00seed")
    status, error = refused("--config", tmp_path / "binary.toml")
    assert status == 2 and error.startswith("Config file is not valid TOML: ")


@pytest.mark.parametrize("text", ["mlx_grpo = 3", 'mlx_grpo = "learning_rate"', "[[mlx_grpo]]\nseed = 1"])
def test_an_mlx_grpo_that_is_no_table_is_refused(refused, toml, text):
    status, error = refused("--config", toml(text))
    assert status == 2 and "mlx_grpo" in error


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--config"], ["positional"]])
def test_an_unknown_flag_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        mlx_grpo.main(arguments)
    assert stopped.value.code == 2 and "usage: mlx-grpo.py" in capsys.readouterr().err


def test_the_script_itself_exits_with_2_and_one_line(tmp_path):
    def run(*arguments, **environment):
        command = [sys.executable, str(ROOT / "mlx-grpo.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **environment}, timeout=60)

    done = run("--set", "learning_rat=1")
    assert (done.returncode, done.stderr) == (2, "Unknown config key: learning_rat (did you mean learning_rate?)\n")
    done = run(MLX_GRPO_CONFIG="absent.toml")
    assert (done.returncode, done.stderr) == (2, "Config file not found: absent.toml\n")


# What cannot be


@pytest.mark.parametrize(
    "override, says",
    [
        ("loss_type=ppo", "grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, gmpo"),
        ("advantage_estimator=gae", "group, rloo, reinforce_plus_plus_baseline, maxrl"), ("importance_sampling_level=word", "token, sequence"),
        ("scale_rewards=std", "group, batch, none"), ("sampler_correction=tis", "token_truncate"), ("lr_scheduler_type=step", "cosine, linear, constant"),
        ("fine_tune_type=qlora", "lora, dora"), ("multi_objective_aggregation=sum", "normalize_then_sum"),
        ("bits=7", "4"), ("group_size=16", "64"),
    ],
)  # fmt: skip
def test_a_choice_that_does_not_exist_comes_with_those_that_do(refused, override, says):
    status, error = refused("--set", override)
    name, _, value = override.partition("=")
    assert status == 2 and error.startswith(f"Invalid {name}: ") and value in error and says in error


@pytest.mark.parametrize(
    "override",
    ["batch_size=0", "batch_size=-1", "num_generations=1", "max_completion_length=0", "max_prompt_length=0", "temperature=0", "temperature=-1", "top_p=1.5",
     "top_p=-0.1", "min_p=2", "top_k=-1", "repetition_penalty=0", "learning_rate=-1e-6", "warmup_ratio=1.5", "num_epochs=0", "gradient_accumulation_steps=0",
     "logging_steps=0", "clip_eps=-0.1", "clip_eps_high=-0.1", "delta=-1", "kl_coeff=-0.1", "top_entropy_quantile=1.1", "top_entropy_quantile=-0.1",
     "num_iterations=0", "sync_every=0", "max_grad_norm=-1", "adam_beta1=1.1", "adam_beta2=-0.1", "weight_decay=-1", "eval_fraction=0", "eval_fraction=1.5",
     "reward_timeout=0", "max_train_samples=-1", "max_new_tokens=-1", "eval_steps=-1", "save_steps=-1", "num_layers=-2", "seed=-1", "micro_batch_tokens=0",
     "eval_subset_size=0", "max_nan_updates=0", "learning_rate=inf", "off_policy_mask_threshold=-1", "entropy_coef=-1", "kv_budget_gb=-1",
     # A division by these:
     "vespo_lambda_pos=0", "vespo_lambda_neg=0", "vespo_k_pos=-1", "entropy_target=-1", "entropy_coef_delta=-1",
     "sapo_temperature_pos=0", "sapo_temperature_neg=0", "sapo_temperature_pos=-1", "adam_beta1=1", "adam_beta2=1"],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(refused, override):
    status, error = refused("--set", override)
    name, _, value = override.partition("=")
    assert status == 2 and error.startswith(f"Invalid {name}: ") and "must be" in error


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["reward_funcs=[]"], "reward_funcs is empty"),
        (["reward_weights=[1.0]"], "reward_weights has 1 entries for 5 reward functions"),
        (["max_new_tokens=64", "max_completion_length=32"], "max_new_tokens (64) is above max_completion_length (32)"),
        (['lora_parameters={rank=8, scale=20.0, dropout=0.1}'], "lora_parameters.dropout must be 0"),
        (["lora_parameters={rank=8}"], "lora_parameters needs rank and scale"),
        (["lora_parameters={rank='8', scale=20.0}"], "lora_parameters"),
        (["lora_parameters={rank=0, scale=20.0}"], "lora_parameters"),
        (["lora_parameters={rank=8, scale=20.0, alpha=16}"], "lora_parameters"),  # a key that nothing would read
        (["fine_tune_type=full", "num_layers=4"], "num_layers is for adapters"),
        (["fine_tune_type=lora", "num_layers=0"], "num_layers = 0 would train nothing"),
        (["loss_type=vespo", "sampler_correction=sequence_mask"], "loss_type vespo takes a sampler correction into its weight token by token"),
        (["loss_type=vespo", "importance_sampling_level=sequence"], "loss_type vespo works on whole sequences already"),
        (["loss_type=gmpo", "importance_sampling_level=sequence"], "loss_type gmpo works on whole sequences already"),
        (["loss_type=cispo", "delta=4"], "delta does nothing for loss_type cispo"),
        (["loss_type=gmpo", "delta=4"], "delta does nothing for loss_type gmpo"),
        (["advantage_estimator=rloo", "scale_rewards=batch"], "scale_rewards is for advantage_estimator group: rloo scales in its own way"),
        (["advantage_estimator=reinforce_plus_plus_baseline", "scale_rewards=none"], "scale_rewards is for advantage_estimator group"),
        (["advantage_estimator=maxrl", "multi_objective_aggregation=normalize_then_sum"], "leave advantage_estimator at group"),
        (["entropy_coef_min=0.5", "entropy_coef_max=0.1"], "entropy_coef_min (0.5) is above entropy_coef_max (0.1)"),
        (["run_name=a/b"], "run_name must be a plain name"),
        (["run_name=.."], "run_name must be a plain name"),
        (["sampler_correction_min=2.0", "sampler_correction_max=1.0"], "sampler_correction_min"),  # no weight lies in an empty range
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_before_anything_is_loaded(refused, overrides, says):
    status, error = refused(*(part for override in overrides for part in ("--set", override)), "--set", "model_name=no/such-model")
    assert status == 2 and says in error


@pytest.mark.parametrize("loss_type", mlx_grpo.LOSSES)
def test_whole_sequence_ratios_with_sums_over_tokens_are_warned_of(loss_type):
    warned = doubts(MLXGRPOConfig(loss_type=loss_type))
    assert warned == []
    if mlx_grpo.LOSSES[loss_type].whole_rows:
        return
    warned = doubts(MLXGRPOConfig(loss_type=loss_type, importance_sampling_level="sequence"))
    if loss_type in ("bnpo", "dr_grpo", "dapo", "cispo"):
        assert len(warned) == 1 and f"loss_type {loss_type} sums over tokens" in warned[0]
    else:
        assert warned == []


def test_the_corrections_that_each_loss_can_take():
    assert MLXGRPOConfig(loss_type="vespo", sampler_correction="token_mask").correction == "token_mask"
    assert MLXGRPOConfig(loss_type="vespo", sync_every=2).correction == "token_truncate"  # auto
    assert MLXGRPOConfig(loss_type="vespo").correction is None
    assert MLXGRPOConfig(advantage_estimator="rloo", scale_rewards="none").estimator is mlx_grpo.ESTIMATORS["rloo"]


def test_the_same_holds_for_a_config_made_in_python():
    with pytest.raises(UserError, match="Invalid num_generations: 1; it must be at least 2"):
        MLXGRPOConfig(num_generations=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLXGRPOConfig().seed = 1


# Where values come from


def test_overrides_win_over_the_file_and_the_file_over_defaults(toml):
    path = toml("learning_rate = 3e-5\nbatch_size = 3\n")
    config = load_config(path, ["batch_size=5", "seed=1", "seed=2"])
    assert (config.learning_rate, config.batch_size, config.seed) == (3e-5, 5, 2)
    assert config.num_generations == MLXGRPOConfig().num_generations
    assert read_settings(FIELD_TYPES, path, ["batch_size=5"])[1] == {"learning_rate": "mine.toml", "batch_size": "--set"}


def test_keys_are_flat_or_in_a_table(toml):
    flat, table, both = (toml(text, name) for name, text in (
        ("flat.toml", "seed = 7\nkl_coeff = 1\n[lora_parameters]\nrank = 4\nscale = 2.0\n"),
        ("table.toml", "[mlx_grpo]\nseed = 7\nkl_coeff = 1\n[mlx_grpo.lora_parameters]\nrank = 4\nscale = 2.0\n"),
        ("both.toml", "kl_coeff = 1\nlora_parameters = {rank = 4, scale = 2.0}\n[mlx_grpo]\nseed = 7\n"),
    ))  # fmt: skip
    assert load_config(flat) == load_config(table) == load_config(both)
    assert load_config(flat).seed == 7 and load_config(flat).kl_coeff == 1.0


def test_an_empty_file_and_no_file_are_the_defaults(toml):
    assert load_config(toml("")) == load_config() == load_config(toml("[mlx_grpo]\n")) == MLXGRPOConfig()


def test_the_environment_names_the_file_and_the_command_line_another(refused, monkeypatch, toml):
    from_environment, given = toml("seed = -3", "environment.toml"), toml("seed = -4", "given.toml")
    monkeypatch.setenv("MLX_GRPO_CONFIG", str(from_environment))
    assert refused()[1].startswith("Invalid seed: -3")
    assert refused("--config", given)[1].startswith("Invalid seed: -4")
    assert refused("--set", "seed=-5")[1].startswith("Invalid seed: -5")


def test_with_neither_the_quickstart_runs(monkeypatch, capsys):
    monkeypatch.delenv("MLX_GRPO_CONFIG", raising=False)

    class Stop(Exception):
        pass

    def trainer(config, run_dir, ranks):
        assert config == load_config(ROOT / "configs" / "quickstart.toml") and Path(run_dir).name.startswith("quickstart")
        raise Stop

    monkeypatch.setattr(mlx_grpo.script, "MLXGRPOTrainer", trainer)
    with pytest.raises(Stop):
        mlx_grpo.main([])
    shown = capsys.readouterr().out
    assert 'model_name = "starter/model"  # quickstart.toml' in shown and "# default" not in shown


@pytest.mark.parametrize("text, value", [*((t, True) for t in ("true", "1", "yes", "on", "True", "YES", " on ")), *((t, False) for t in ("false", "0", "no", "off", "False", "OFF"))])
def test_booleans(text, value):
    assert load_config(None, [f"log_jsonl={text}"]).log_jsonl is value


def test_lists_are_toml_and_whole_numbers_may_stand_for_floats(toml):
    config = load_config(None, ['reward_funcs=["int_reward_func", "r.py:f"]', "reward_weights=[1, 0.5]", "stop_strings=[]", "learning_rate=1"])
    assert config.reward_funcs == ["int_reward_func", "r.py:f"] and config.stop_strings == []
    assert config.reward_weights == [1.0, 0.5] and all(type(w) is float for w in config.reward_weights)
    assert type(config.learning_rate) is float
    assert type(load_config(toml("kl_coeff = 1")).kl_coeff) is float
    assert load_config(None, ["lora_parameters={rank=4, scale=2.0}"]).lora_parameters == {"rank": 4, "scale": 2.0}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MLXGRPOConfig) if f.type == float | None])
@pytest.mark.parametrize("text", ["none", "None", "null", ""])
def test_none_unsets_an_optional_number(toml, name, text):
    path = toml(f"{name} = 0.5")
    assert getattr(load_config(path), name) == 0.5
    assert getattr(load_config(path, [f"{name}={text}"]), name) is None


def test_a_value_may_hold_equals_signs_and_spaces():
    config = load_config(None, ["system_prompt=a = b", " seed = 3", "completion_prefix=<reasoning>\n"])
    assert (config.system_prompt, config.seed, config.completion_prefix) == ("a = b", 3, "<reasoning>\n")


# Round trip


def test_the_resolved_configuration_reads_back_as_itself(toml):
    for overrides in ([], ["delta=2.5", "reward_funcs=['int_reward_func']", "reward_weights=[2]", r"completion_prefix=a\"'\n", "lora_parameters={rank=1, scale=2.0, keys=['q', 'v']}"]):
        values, sources = read_settings(FIELD_TYPES, None, overrides)
        config = MLXGRPOConfig(**values)
        text = config_as_toml(config, sources)
        assert load_config(toml(text)) == config


def test_the_resolved_configuration_has_a_line_a_field_with_its_source(toml):
    values, sources = read_settings(FIELD_TYPES, toml("seed = 3"), ["delta=2.5"])
    lines = config_as_toml(MLXGRPOConfig(**values), sources).splitlines()
    assert len(lines) == len(FIELDS)
    assert "seed = 3  # mine.toml; default 0" in lines and "delta = 2.5  # --set; default null" in lines and "batch_size = 8  # default" in lines
    assert "# clip_eps_high is unset  # default" in lines


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
finite = st.floats(0, 1e9, allow_nan=False)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    system_prompt=text, completion_prefix=text, model_name=text, stop_strings=st.lists(text, max_size=3), learning_rate=finite, delta=st.none() | finite,
    seed=st.integers(0, 2**62), use_compile=st.booleans(), temperature=st.floats(1e-3, 10), scale=st.floats(1e-3, 1e3),
)  # fmt: skip
def test_any_configuration_reads_back_as_itself(tmp_path_factory, scale, **values):
    config = MLXGRPOConfig(**values, lora_parameters={"rank": 8, "scale": scale})
    written = tomllib.loads(config_as_toml(config, {}))
    assert MLXGRPOConfig(**{name: coerce(name, value, FIELDS[name].type, False) for name, value in written.items()}) == config


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(name=st.sampled_from(sorted(FIELDS)), value=st.one_of(text, st.floats().map(str), st.integers().map(str), st.sampled_from(["[]", "{}", "true", "[1]", "[[]]", "none"])))
def test_no_override_at_all_ends_in_a_traceback(name, value):
    try:
        config = load_config(None, [f"{name}={value}"])
    except UserError as error:
        assert "\n" not in str(error).replace(value, "")
    else:
        assert isinstance(config, MLXGRPOConfig)
        got = getattr(config, name)
        assert not isinstance(got, float) or math.isfinite(got)


# Every setting is used, every file is good


def fields_read(source: str) -> set[str]:
    """Names read as config.NAME, as self.NAME in a property of MLXGRPOConfig, or taken by grpo_loss under their name."""
    tree, read = ast.parse(source), set()
    config_class = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MLXGRPOConfig")
    properties = [node for node in config_class.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    rest = [node for node in tree.body if node is not config_class]
    for node in (child for top in rest for child in ast.walk(top)):
        if isinstance(node, ast.Attribute) and re.search(r"(^|\.)(config|small|whole)$", ast.unparse(node.value)):
            read.add(node.attr)
        if isinstance(node, ast.FunctionDef) and node.name == "grpo_loss":
            read |= {argument.arg for argument in node.args.kwonlyargs}
    used = {node.attr for top in rest for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    for node in properties:
        if node.name in used:
            read |= {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
    return read


PROGRAM = [ROOT / "mlx-grpo.py", *ROOT.glob("mlx_grpo/**/*.py")]


def test_every_setting_is_read_somewhere():
    unread = set(FIELDS) - fields_read("\n".join(path.read_text() for path in PROGRAM if path.name != "settings.py"))
    assert not unread, f"settings that nothing reads: {', '.join(sorted(unread))}"


def test_every_setting_carries_its_reason():
    lines = (ROOT / "mlx-grpo.py").read_text().splitlines()
    self_evident = {"adam_beta1", "adam_beta2"}
    start = next(i for i, line in enumerate(lines) if line.startswith("class MLXGRPOConfig"))
    for name in set(FIELDS) - self_evident:
        at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"    {name}: "))
        end = next(i for i in range(at, len(lines)) if "#" in lines[i] or re.match(r"    \w+: ", lines[i + 1]))
        assert "#" in lines[end], name


CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_loads_and_begins_with_a_comment(path):
    assert path.read_text().startswith("# ")
    config = load_config(path)
    assert config.num_generations >= 2
    again = tomllib.loads(path.read_text())
    assert set(again.get("mlx_grpo", again)) <= set(FIELDS)


def test_there_is_a_quickstart():
    assert "quickstart.toml" in [path.name for path in CONFIGS]


CONTRACT = (
    "model_name output_dir run_name learning_rate batch_size gradient_accumulation_steps num_epochs max_train_samples warmup_ratio max_grad_norm "
    "logging_steps num_generations max_prompt_length max_completion_length max_new_tokens temperature top_p repetition_penalty clip_eps kl_coeff "
    "adam_beta1 adam_beta2 weight_decay lr_scheduler_type save_steps eval_steps eval_samples eval_every_updates eval_subset_size eval_max_new_tokens "
    "seed use_compile quantize_for_rollouts bits group_size log_jsonl"
).split()


def test_the_keys_that_keep_their_names_are_there():
    assert set(CONTRACT) <= set(FIELDS)
