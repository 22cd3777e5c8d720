"""Several processes are one run: W ranks learn what one learns, write once, and end together, whatever ends one of them.

Run as a script this file is one rank: it does the jobs of a file in turn, so that many tests share two processes.
"""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import conftest  # noqa: F401  (as a script: it imports mlx-grpo.py)
import mlx.core as mx
import numpy as np
import pytest

import mlx_grpo
from mlx_grpo import MLXGRPOTrainer, load_config
from mlx_grpo.run.directory import checkpoints
from mlx_grpo.run.distributed import ALONE, Ranks, digest, start_ranks
from mlx_grpo.errors import RunError, UserError

ROOT = Path(mlx_grpo.__file__).parents[1]
TIMEOUT = 4  # seconds, of the ranks in these tests
TIMED = ("seconds", "tokens_per_s", "memory", "wait_by_rank", "communication")
REWARDS = """
import os, signal, time
calls = 0

def noise(completions, **kwargs):
    return [float(sum(map(ord, completion[0]["content"])) % 3) for completion in completions]

def length(completions, completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]

def in_the_second_update(act):
    def reward(completions, **kwargs):
        global calls
        calls += 1
        if calls == 4:  # after the check, the first evaluation and an update
            act()
        return [0.0] * len(completions)
    return reward

def send(number, *ranks):
    return in_the_second_update(lambda: os.environ.get("MLX_RANK") in ranks and os.kill(os.getpid(), number))

killed = send(signal.SIGKILL, "1")
halted = send(signal.SIGSTOP, "1")
interrupted = send(signal.SIGINT, "1")
all_interrupted = send(signal.SIGINT, "0", "1")
slow = in_the_second_update(lambda: os.environ.get("MLX_RANK") == "1" and time.sleep(6))

def fail():
    if os.environ.get("MLX_RANK") == "1":
        raise KeyError("a bug of the user's")

failing = in_the_second_update(fail)
"""

SCENARIOS = {  # settings over `small`: every loss type, and every place where a part must know the whole
    "grpo": ["kl_coeff=0.05"],
    "bnpo, accumulated": ["loss_type=bnpo", "batch_size=2", "gradient_accumulation_steps=2"],
    "dr_grpo, one row a part": ["loss_type=dr_grpo", "scale_rewards=none", "micro_batch_tokens=1"],
    "dapo, dynamic sampling": ["loss_type=dapo", "mask_truncated_completions=true", "dynamic_sampling_max_batches=2"],
    "cispo, reused": ["loss_type=cispo", "num_iterations=2", "clip_eps_high=5"],
    "sapo, scaled by the batch": ["loss_type=sapo", "scale_rewards=batch"],
    "luspo, uneven": ["loss_type=luspo", "importance_sampling_level=sequence", "batch_size=3", "micro_batch_tokens=200"],
    "vespo, reused": ["loss_type=vespo", "num_iterations=2"],
    "each reward normalised": ["multi_objective_aggregation=normalize_then_sum"],
    "top entropy": ["top_entropy_quantile=0.4", "num_iterations=2"],
    "adapters, stale sampler": ["fine_tune_type=lora", "sync_every=2", "learning_rate=1e-2"],
}


def small(folder, *extra):
    """Settings of a run of a few updates; the folder holds its rewards."""
    if not (folder / "rewards.py").exists():
        (folder / "rewards.py").write_text(REWARDS)
    return [
        "model_name=starter/model", "dataset=starter/data", "output_dir=outputs", "max_train_samples=12", "batch_size=4",
        "num_generations=3", "max_completion_length=16", "eval_samples=5", "eval_steps=0", f"distributed_timeout={TIMEOUT}",
        f'reward_funcs=["{folder}/rewards.py:noise", "{folder}/rewards.py:length"]', "learning_rate=1e-3", "save_steps=1",
        "save_total_limit=0", "log_completions_steps=1", "check_weights_steps=1", "use_compile=false", *extra,
    ]  # fmt: skip


def command(folder, *extra, more=()):
    return [part for setting in small(folder, *extra) for part in ("--set", setting)] + list(more)


# A rank at work


def learn(ranks, folder, extra) -> dict:
    """Three rollouts' updates and an evaluation: weights, sampled ids, log records, scores."""
    trainer = MLXGRPOTrainer(load_config(None, small(folder, *extra)), folder / "never written", ranks)
    sampled, rollout = [], trainer.rollout

    def watched(count, watch):
        groups = rollout(count, watch)
        sampled.extend([group.prompt, [[c.ids, c.rewards] for c in group.completions]] for group in groups)
        return groups

    trainer.rollout = watched
    trainer.files.logs.add = lambda *record: None
    records = [record for _ in range(3) for record in trainer.train_step()]
    scores = mlx_grpo.evaluate(trainer.model, trainer.tokenizer, trainer.eval_rows["test"], trainer.config, ranks=ranks)
    return {"weights": mlx_grpo.trainable_arrays(trainer.model), "sampled": sampled, "records": records, "scores": scores}


def come_apart(self, state):
    """In place of check_weights: rank 1's weights have changed by one bit."""
    if self.ranks.rank == 1 and state.update == 2:
        weights = mlx_grpo.trainable_arrays(self.learner.model)
        name, first = next(iter(weights.items()))
        self.learner.model.load_weights([(name, mx.where(mx.arange(first.size).reshape(first.shape) == 7, first * (1 + 2e-7), first))], strict=False)
    self.ranks.check_equal(mlx_grpo.trainable_arrays(self.learner.model), f"after update {state.update}")


def be_a_rank(folder: Path, jobs: list) -> None:
    rank, own = int(os.environ["MLX_RANK"]), mlx_grpo.RunFiles.check_weights
    mlx_grpo.script.write_report = lambda run_dir: None
    for name, kind, given in jobs:
        print(f"== {name}", flush=True)
        print(f"== {name}", file=sys.stderr, flush=True)
        if kind == "learn":
            with start_ranks(TIMEOUT * 4) as ranks:
                result = learn(ranks, folder, given)
            mx.save_safetensors(str(folder / f"{name} {rank}.safetensors"), result.pop("weights"))
            (folder / f"{name} {rank}.json").write_text(json.dumps(result))
            continue
        mlx_grpo.RunFiles.check_weights = come_apart if name == "come apart" else own
        own_settings = ["--set", f"seed={rank}"] if name == "another seed" else []
        try:
            status = mlx_grpo.main([*given, *own_settings])
        except SystemExit as end:
            status = end.code
        (folder / f"{name} {rank}.status").write_text(str(status))


# The tests' side

LIMITS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def start_pair(folder: Path, arguments: list[str], timeout: float = 150) -> list[tuple[int, str, str]]:
    """Two ranks on this machine, each with a working directory of its own: (exit status, stdout, stderr) of each."""
    port = random.randrange(20000, 30000, 2)
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"], [f"127.0.0.1:{port + 1}"]]))
    processes = []
    for rank in "01":
        (folder / f"disk{rank}").mkdir(exist_ok=True)
        environment = {**os.environ, **LIMITS, "MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": rank}
        streams = {"stdout": open(folder / f"stdout{rank}", "w+"), "stderr": open(folder / f"stderr{rank}", "w+")}
        processes.append(subprocess.Popen([sys.executable, *arguments], cwd=folder / f"disk{rank}", env=environment, **streams))
    until = time.monotonic() + timeout
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(timeout)
            processes[1].wait(min(8, max(0.1, until - time.monotonic())))
    finally:
        for process in processes:
            process.kill()  # a stopped one
    return [(p.wait(), (folder / f"stdout{r}").read_text(), (folder / f"stderr{r}").read_text()) for r, p in enumerate(processes)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of two ranks that have done all jobs below, and what each printed in each job."""
    folder = tmp_path_factory.mktemp("pair")
    before = Path.cwd()
    os.chdir(folder)
    run = lambda name, *extra, more=(): [name, "run", command(folder, f"run_name={name}", *extra, more=more)]  # noqa: E731
    reward = lambda name: f'reward_funcs=["{folder}/rewards.py:{name}", "{folder}/rewards.py:noise"]'  # noqa: E731
    # Run by one process, and cut back to its first update for two to go on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)
        patch.chdir(make(folder / "disk0"))
        assert mlx_grpo.main(command(folder, "run_name=one")) == 0
    shutil.copytree(folder / "disk0/outputs/one", folder / "disk0/outputs/one to two")
    rewind(folder / "disk0/outputs/one to two")
    jobs = [[name, "learn", extra] for name, extra in SCENARIOS.items()]
    jobs += [run("one to two", more=["--resume"]), run("two"), run("dry", more=["--dry-run"])]
    jobs += [run(name, reward(name)) for name in ("failing", "interrupted", "all_interrupted", "slow")]
    jobs += [run("come apart"), run("another seed"), run("too small", "batch_size=1")]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    results = start_pair(folder, [str(Path(__file__)), str(folder)])
    assert [status for status, _, _ in results] == [0, 0], results
    printed = [[dict(re.findall(r"== (.*?)\n(.*?)(?=== |\Z)", text, re.DOTALL)) for text in texts] for _, *texts in results]
    yield folder, printed
    os.chdir(before)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rewind(run: Path) -> None:
    """What a kill after the first checkpoint leaves of a finished run: its logs had gone on."""
    shutil.rmtree(run / "final")
    for folder in checkpoints(run)[1:]:
        shutil.rmtree(folder)


def close(a, b, path=""):
    """The same records but for float32 rounding, and for time."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        names = [{k for k in x if not any(t in k for t in TIMED)} for x in (a, b)]
        assert names[0] == names[1], path
        for name in names[0]:
            close(a[name], b[name], f"{path}/{name}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            close(*pair, f"{path}/{i}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5), path
    else:
        assert a == b, path


def records(run: Path, timed=False) -> list[dict]:
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    return lines if timed else [{k: v for k, v in line.items() if not any(t in k for t in TIMED)} for line in lines]


def weights(folder: Path, pattern="model*.safetensors") -> dict:
    return {k: np.array(v) for file in folder.glob(pattern) for k, v in mx.load(str(file)).items()}


def assert_same_weights(a: dict, b: dict, rate=1e-3) -> None:
    """But for rounding: where a gradient is nothing but rounding, Adam makes a visible step of it, so a few may differ by a
    part of a step, which is about the learning rate."""
    assert a.keys() == b.keys()
    gaps = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
    assert np.mean(gaps) < rate / 1000 and np.mean(gaps > rate / 10) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_learn_what_one_learns(pair, tmp_path, name):
    folder, _ = pair
    alone = learn(ALONE, tmp_path, SCENARIOS[name])
    ranks = [json.loads((folder / f"{name} {rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["sampled"] == ranks[1]["sampled"] == alone["sampled"]
    assert sum(record["grad_norm"] > 0 for record in alone["records"]) >= 2
    close(ranks[0]["records"], alone["records"])
    close(ranks[0]["scores"], json.loads(json.dumps(alone["scores"])))
    found = [weights(folder, f"{name} {rank}.safetensors") for rank in (0, 1)]
    assert all((found[0][k] == found[1][k]).all() for k in found[0])  # the ranks to the bit
    assert_same_weights(found[0], {k: np.array(v) for k, v in alone["weights"].items()}, rate=1e-2 if "adapters" in name else 1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(pair, monkeypatch):
    folder, _ = pair
    outputs = folder / "disk0" / "outputs"
    shutil.copytree(outputs / "two", outputs / "two to one")
    rewind(outputs / "two to one")
    monkeypatch.chdir(folder / "disk0")
    monkeypatch.setattr(mlx_grpo.script, "write_report", lambda run_dir: None)
    assert mlx_grpo.main(command(folder, "run_name=two to one", more=["--resume"])) == 0
    for name in ("two", "one to two", "two to one"):
        close(records(outputs / name), records(outputs / "one"))
        assert (outputs / name / "completions.jsonl").read_text() == (outputs / "one" / "completions.jsonl").read_text()
        assert_same_weights(weights(outputs / name / "final"), weights(outputs / "one" / "final"))
        assert len(checkpoints(outputs / name)) == len(checkpoints(outputs / "one")) == 2


@pytest.mark.slow
def test_only_rank_0_writes_and_speaks(pair):
    folder, printed = pair
    assert list((folder / "disk1").iterdir()) == []
    for job in ("one to two", "two", "dry", "interrupted", "slow", "come apart"):
        assert printed[1][0][job] == printed[1][1][job] == ""
        assert "ranks      2" in printed[0][0][job]
    assert printed[0][0]["two"].count("3/3 reward") == 1
    assert "all well" in printed[0][0]["dry"] and not (folder / "disk0/outputs/dry").exists()
    for rank in (0, 1):
        assert (folder / f"two {rank}.status").read_text() == (folder / f"dry {rank}.status").read_text() == "0"


@pytest.mark.slow
def test_the_wait_of_each_rank_is_logged(pair):
    folder, printed = pair
    updates = [r for r in records(folder / "disk0/outputs/slow", timed=True) if "event" not in r]
    assert updates[1]["wait_by_rank"][0] > 5 > updates[1]["wait_by_rank"][1] and updates[1]["seconds/reward"] > 5
    assert 0 < updates[0]["communication_time"] < 5
    # Slow is not dead: beyond distributed_timeout it is said, and the run goes on.
    assert re.search("^Waiting for rank 1 for 4 s; alive", printed[0][1]["slow"], re.MULTILINE)
    assert (folder / "slow 0.status").read_text() == "0" and len(updates) == 3


@pytest.mark.slow
def test_a_failed_reward_of_one_rank_is_the_runs(pair):
    folder, printed = pair
    last = printed[0][1]["failing"].strip().splitlines()[-1]
    assert last.startswith("rank 1: Reward function reward raised KeyError")
    assert "a bug of the user's" in printed[1][1]["failing"] and "Traceback" in printed[1][1]["failing"]
    assert [(folder / f"failing {rank}.status").read_text() for rank in (0, 1)] == ["1", "1"]
    assert [p.name for p in checkpoints(folder / "disk0/outputs/failing")] == ["checkpoint-1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interrupted", "all_interrupted"])
def test_ctrl_c_on_any_rank_saves_once_and_ends_all(pair, name):
    folder, printed = pair
    assert [(folder / f"{name} {rank}.status").read_text() for rank in (0, 1)] == ["130", "130"]
    assert [p.name for p in checkpoints(folder / "disk0/outputs" / name)] == ["checkpoint-1", "checkpoint-2"]
    assert printed[0][1][name].count("Stopped at update 2 of 3") == 1


@pytest.mark.slow
def test_weights_that_come_apart_stop_the_run(pair):
    folder, printed = pair
    assert printed[0][1]["come apart"].startswith("Weights differ between ranks 0 and 1 after update 2")
    assert [p.name for p in checkpoints(folder / "disk0/outputs/come apart")] == ["checkpoint-1"]
    assert [(folder / f"come apart {rank}.status").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.slow
def test_ranks_that_cannot_train_together_are_refused(pair):
    folder, printed = pair
    assert printed[0][1]["another seed"].startswith("Ranks 0 and 1 differ in settings")
    assert printed[0][1]["too small"].startswith("2 ranks share 1 prompts an update")
    for name in ("another seed", "too small"):
        assert [(folder / f"{name} {rank}.status").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("fate, said", [("killed", "Rank 1 ended without a word"), ("halted", f"Rank 1 hangs: nothing .* {TIMEOUT} s")])
def test_a_rank_that_dies_or_hangs_ends_the_run(tmp_path, fate, said):
    reward = f'reward_funcs=["{tmp_path}/rewards.py:{fate}", "{tmp_path}/rewards.py:noise"]'
    (status, _, errors), _ = start_pair(tmp_path, [str(ROOT / "mlx-grpo.py"), *command(tmp_path, reward, "run_name=run", "log_jsonl=false")], timeout=60)
    assert status == 1  # it ended by itself: what is killed at the limit has another status
    assert re.search(said, errors, re.MULTILINE)
    assert len(checkpoints(tmp_path / "disk0/outputs/run")) == 1  # of update 1: the rank went in update 2


@pytest.mark.slow
def test_a_rank_that_stays_alone_gives_up(tmp_path):
    (tmp_path / "hosts.json").write_text(json.dumps([["127.0.0.1:20000"], ["127.0.0.1:20001"]]))
    own = [sys.executable, str(ROOT / "mlx-grpo.py"), *command(tmp_path, "distributed_timeout=2")]
    environment = {**os.environ, **LIMITS, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "0"}
    result = subprocess.run(own, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "waiting at most 2 s for 2" in result.stdout and "Timeout" in result.stderr


@pytest.mark.slow
def test_the_launcher_starts_ranks(tmp_path):
    launch = Path(sys.executable).with_name("mlx.launch")
    own = ["--", sys.executable, str(ROOT / "mlx-grpo.py"), *command(tmp_path, "distributed_timeout=60", more=["--dry-run"])]
    port = str(random.randrange(20000, 30000))
    result = subprocess.run(
        [str(launch), "-n", "2", "--backend", "ring", "--starting-port", port, *own], cwd=tmp_path, capture_output=True, text=True,
        timeout=100, stdin=subprocess.DEVNULL, env={**os.environ, **LIMITS},
    )  # fmt: skip
    assert result.stdout.count("all well") == 1 and "ranks      2" in result.stdout


def test_a_world_of_another_size_than_asked_for_is_refused(tmp_path, monkeypatch):
    alone = mx.distributed.init()
    (tmp_path / "hosts.json").write_text(json.dumps([["127.0.0.1:20000"], ["127.0.0.1:20001"]]))
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setattr(mx.distributed, "init", lambda **given: alone)
    with pytest.raises(RunError, match="2 ranks were asked for, and MLX's ring backend found 1"):
        start_ranks(5)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="list of hosts cannot be read"):
        start_ranks(5)


def test_work_is_balanced_and_every_item_has_one_rank():
    lengths = [900, 100, 100, 100, 500, 400, 300, 100]
    shares = [Ranks(rank, 3).balanced(list(range(8)), lengths.__getitem__) for rank in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(8))
    assert [sum(lengths[i] for i in share) for share in shares] == [900, 800, 800]
    assert ALONE.balanced([3, 1], lambda i: i) == [3, 1]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.int8, mx.uint64])
def test_a_digest_sees_every_element(dtype):
    array = (mx.arange(60) % 7).reshape(3, 20).astype(dtype)
    seen = {digest(array)} | {digest(array.at[i // 20, i % 20].add(mx.array(1, dtype=dtype))) for i in range(60)}
    assert len(seen) == 61
    assert digest(mx.array(2.5)) != digest(mx.array(2.25))


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "jobs.json").read_text()))
