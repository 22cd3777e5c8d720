"""Parts of one computation side by side on a CPU: the same results, and each lane at work."""

import mlx.core as mx
import numpy as np
import pytest
from test_rollout import roll
from test_training import groups_of, largest_gap, train_on, trainer_of, whole_gradient
from tiny import ids_of, logps_of, reasons_of, tiny_model

from mlx_grpo.update import micro_batches
from mlx_grpo.backends import streams as side
import mlx_grpo

pytestmark = pytest.mark.skipif(mx.default_device() == mx.gpu, reason="a GPU has one lane")


def test_streams_are_as_many_as_cores_tasks_and_the_limit_allow(monkeypatch):
    monkeypatch.setattr(side, "cores", lambda: 3)
    for most, count in ((0, 1), (1, 1), (2, 2), (9, 3)):
        with side.streams_of_cores(most) as streams:
            assert len(set(map(str, streams))) == count
    monkeypatch.setattr(side, "cores", lambda: 64)
    assert side.stream_count() == side.MOST_STREAMS
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert side.stream_count() == 1


def test_the_blas_gets_a_streams_share_of_the_cores_and_all_of_them_back(monkeypatch):
    given = []
    monkeypatch.setattr(side, "cores", lambda: 8)
    monkeypatch.setattr(side, "set_blas_threads", lambda count: (given.append(count), 7)[1])
    with pytest.raises(KeyError), side.streams_of_cores(2):
        raise KeyError
    assert given == [4, 7]


def test_what_is_spread_comes_back_evaluated_and_in_order(monkeypatch):
    monkeypatch.setattr(side, "cores", lambda: 3)
    seen = []
    results = side.run_on_streams(lambda n: (seen.append(str(mx.default_stream(mx.cpu))), mx.arange(n).sum())[1], list(range(1, 8)))
    assert [r.item() for r in results] == [n * (n - 1) // 2 for n in range(1, 8)]
    assert len(set(seen)) == 3 and seen[:3] == seen[3:6]
    assert list(side.run_on_streams(lambda n: n, [])) == []


def test_the_next_part_is_built_but_waits_for_the_one_before(monkeypatch):
    monkeypatch.setattr(side, "cores", lambda: 1)
    size, built = 2**20, []

    def part(n):
        built.append(n)
        return mx.random.normal((size,), key=mx.random.key(n)) + n

    total = None
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for done, value in enumerate(side.run_on_streams(part, list(range(6))), 1):
        assert built == list(range(done))  # one after the other, however many there are
        total = value if total is None else total + value
        mx.async_eval(total)
        del value
    mx.eval(total)
    assert mx.get_peak_memory() - before < 5 * 4 * size  # two sums and a part with what it is made of, not six parts


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "mamba2"])
def test_completions_do_not_depend_on_the_number_of_streams(name, monkeypatch):
    model = tiny_model(name)
    monkeypatch.setattr(side, "cores", lambda: 1)
    alone = roll(model, stop_strings=["*"])
    monkeypatch.setattr(side, "cores", lambda: 3)
    monkeypatch.setattr(mlx_grpo.script, "STREAM_ROWS", 1)
    together = roll(model, stop_strings=["*"])
    assert ids_of(together) == ids_of(alone) and reasons_of(together) == reasons_of(alone)
    for a, b in zip(logps_of(together), logps_of(alone)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_streams_share_an_update_and_add_up_to_its_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(side, "cores", lambda: 1)
    trainer = trainer_of(tmp_path, "use_compile=true")
    groups = groups_of(trainer)
    one, loss, grads = whole_gradient(trainer, groups, 10**6)
    monkeypatch.setattr(side, "cores", lambda: 2)
    monkeypatch.setattr(micro_batches, "STREAM_POSITIONS", 1)
    advantages = np.array([[1.0, -1.0] * (trainer.config.num_generations // 2)] * len(groups))
    assert len(trainer.learner.prepare(groups, advantages)) == 2
    assert len(trainer.learner.prepare(groups[:1], advantages[:1])) == 2  # one group: its rows are split
    two, split_loss, split_grads = whole_gradient(trainer, groups, 10**6)
    assert (one, two) == (1, 2)
    assert split_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert largest_gap(split_grads, grads) < 1e-4


def test_an_update_by_two_streams_is_that_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batches, "STREAM_POSITIONS", 1)
    records, weights = [], []
    for count in (1, 2):
        monkeypatch.setattr(side, "cores", lambda: count)
        trainer = trainer_of(tmp_path, "use_compile=true", "kl_coeff=0.1", "num_iterations=2")  # the reference and the old log-probs too
        records.append(train_on(trainer, groups_of(trainer)))
        weights.append(mlx_grpo.trainable_arrays(trainer.model))
    for one, two in zip(*records):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert largest_gap(weights[1], weights[0]) < 1e-3
