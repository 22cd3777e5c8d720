"""What a checkpoint holds and asks for: adapters alone, the same inputs as before, and merges by shards."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_safety import arguments, small, train

import mlx_grpo
from mlx_grpo import export
from mlx_grpo.run.directory import checkpoints

ROOT = Path(__file__).resolve().parent.parent
LORA = ["fine_tune_type=lora", "learning_rate=1e-2"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A finished run of adapters; its folder."""
    folder = tmp_path_factory.mktemp("adapters")
    patch = pytest.MonkeyPatch()
    patch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)
    assert train(folder, *LORA) == 0
    patch.undo()
    return folder / "run"


def test_a_checkpoint_of_adapters_holds_no_merged_model(adapters):
    for folder in checkpoints(adapters):
        names = {path.name for path in folder.iterdir()}
        assert names == {"adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "trainer_state.json", "manifest.json"}
    # The model itself is in `final`: what has adapters differs from the base, and nothing else does.
    base, final = (mx.load(str(folder / "model.safetensors")) for folder in (ROOT / "starter" / "model", adapters / "final"))
    adapted = {name.rpartition(".")[0] + ".weight" for name in mx.load(str(checkpoints(adapters)[-1] / "adapters.safetensors"))}
    assert final.keys() == base.keys()
    assert {name for name in base if not mx.array_equal(final[name].astype(mx.float32), base[name].astype(mx.float32))} == adapted


def test_a_checkpoint_of_adapters_opens_on_its_base_as_mlx_lms_users_open_it(adapters):
    from mlx_lm import load

    newest, ids = checkpoints(adapters)[-1], mx.array([[5, 6, 7]])
    as_users_do, _ = load(str(ROOT / "starter" / "model"), adapter_path=str(newest))
    by_the_scripts, _, _ = mlx_grpo.open_model(str(newest))
    base, _, _ = mlx_grpo.open_model("starter/model")
    adapter, scale = mx.load(str(newest / "adapters.safetensors")), json.loads((newest / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    weights = dict(tree_flatten(base.parameters()))
    merged = [(f"{n}.weight", weights[f"{n}.weight"] + scale * (adapter[f"{n}.lora_a"] @ adapter[f"{n}.lora_b"]).T) for n in sorted({n.rpartition(".")[0] for n in adapter})]
    base.load_weights(merged, strict=False)
    np.testing.assert_allclose(np.array(as_users_do(ids)), np.array(by_the_scripts(ids)), atol=1e-5)
    np.testing.assert_allclose(np.array(base(ids)), np.array(by_the_scripts(ids)), atol=1e-4)
    assert all(mx.any(adapter[name] != 0) for name in adapter)  # B begins as zeros: the base alone would not pass


def test_an_adapter_that_does_not_name_its_model_is_refused_in_one_line(adapters, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(checkpoints(adapters)[-1], folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(mlx_grpo.UserError, match="^Adapter without its model: .* by --adapter-path$"):
        mlx_grpo.open_model(str(folder))


@pytest.mark.parametrize("limit", [2**40, 100_000, 1])
def test_shards_hold_each_weight_once_and_open_again(tmp_path, monkeypatch, limit):
    from mlx_lm import load

    monkeypatch.setattr(export, "SHARD_BYTES", limit)
    model, tokenizer, config = mlx_grpo.open_model("starter/model")
    export.save_model(tmp_path, model, tokenizer, config, ROOT / "starter" / "model", mlx_grpo.load_config())
    files = sorted(tmp_path.glob("model*.safetensors"))
    sizes = [sum(a.nbytes for a in mx.load(str(file)).values()) for file in files]
    largest = max(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert max(sizes) <= max(limit, largest) and (len(files) == 1) == (limit == 2**40)
    opened, _ = load(str(tmp_path))
    ids = mx.array([[5, 6, 7]])
    assert mx.array_equal(opened(ids), model(ids))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {file.name for file in files}


# A resume reads what the run read


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run with data, a reward file and a base model of its own, stopped after its first update; its folder."""
    monkeypatch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)
    shutil.copytree(ROOT / "starter" / "model", tmp_path / "base")
    for split in ("train", "test"):
        lines = (ROOT / "starter" / "data" / f"{split}.jsonl").read_text().splitlines()[:12]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "own.py").write_text("def noise(completions, **_):\n    return [len(c[0]['content']) % 3 for c in completions]\n")
    step = mlx_grpo.MLXGRPOTrainer.train_step

    def stop_after_one(self):
        records = step(self)
        self.request_stop(15)
        return records

    monkeypatch.setattr(mlx_grpo.MLXGRPOTrainer, "train_step", stop_after_one)
    assert train(tmp_path, *own(tmp_path)) == 143
    monkeypatch.setattr(mlx_grpo.MLXGRPOTrainer, "train_step", step)
    return tmp_path


def own(folder):
    return [f"model_name={folder / 'base'}", f"dataset={folder}", f'reward_funcs=["{folder / "own.py"}:noise"]', *LORA, "max_train_samples=0"]


def edit_answer(folder):
    path = folder / "train.jsonl"
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    path.write_text("\n".join([json.dumps({**row, "answer": "#### 123456"}), *rest]) + "\n")


def add_row(folder):
    path = folder / "train.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


def edit_reward(folder):
    path = folder / "own.py"
    path.write_text(path.read_text().replace("% 3", "% 2"))


def replace_base(folder):
    path = folder / "base" / "model.safetensors"
    weights = mx.load(str(path))
    name = next(n for n in weights if "down_proj" in n)
    mx.save_safetensors(str(path), {**weights, name: weights[name] * 1.01}, {"format": "mlx"})


def edit_held_out(folder):
    path = folder / "test.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


@pytest.mark.parametrize(
    "change, named",
    [
        (edit_answer, "the training data"), (add_row, "the training data"), (edit_reward, "the reward file"),
        (replace_base, "the base model"), (edit_held_out, "the held-out data"),
    ],
)  # fmt: skip
def test_a_resume_on_other_inputs_is_refused_by_name_unless_accepted(stopped, capsys, change, named):
    change(stopped)
    capsys.readouterr()
    assert train(stopped, *own(stopped), more=["--resume"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("Cannot resume ") and named in error and "--accept-changed-inputs" in error
    assert train(stopped, *own(stopped), more=["--resume", "--accept-changed-inputs"]) == 0
    records = [json.loads(line) for line in (stopped / "run" / "training_log.jsonl").read_text().splitlines()]
    assert [any(named in name for name in r["changed"]) for r in records if r.get("event") == "resume"] == [True]


def test_a_resume_on_the_same_inputs_goes_on(stopped):
    assert train(stopped, *own(stopped), more=["--resume"]) == 0
