"""The objective: equal to TRL's numbers, to a second implementation, to hand-worked ones, and deaf to what must not matter."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import pytest

import mlx_grpo
from mlx_grpo import (
    METRICS, MLXGRPOConfig, PartSizes, UserError, combine_rewards, correction_weights, estimate_advantages, group_advantages, grpo_loss,
    masked_quantile, merge_metrics, next_entropy_coef,
)  # fmt: skip

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "objective_cases.json").read_text())
ADVANTAGES = json.loads((DATA / "advantage_cases.json").read_text())
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gmpo")
LEVELS = ("token", "sequence")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
NAMES = ("logps", "old_logps", "ref_logps", "sampler_logps", "entropies", "advantages", "mask")


def value_and_grads(inputs: dict, **options):
    """(loss, gradient by logps, gradient by entropies, metrics) of grpo_loss on numpy inputs."""
    arrays = {name: None if inputs.get(name) is None else mx.array(inputs[name], dtype=mx.float32) for name in NAMES}
    entropies = arrays["entropies"] if arrays["entropies"] is not None else mx.zeros(arrays["logps"].shape)
    metrics = {}

    def loss(logps, entropies):
        given = {"ref_logps": arrays["ref_logps"], "sampler_logps": arrays["sampler_logps"], "entropies": entropies}
        value, found = grpo_loss(logps, arrays["old_logps"], arrays["advantages"], arrays["mask"], **given, **options)
        metrics.update(found)
        return value

    value, (by_logps, by_entropies) = mx.value_and_grad(loss, argnums=(0, 1))(arrays["logps"], entropies)
    return value.item(), np.array(by_logps), np.array(by_entropies), {name: x.item() for name, x in metrics.items()}


def assert_loss(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-6, rtol=5e-6)


def assert_grad(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-7, rtol=2e-5)


# TRL's numbers


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=lambda case: case["name"])
def test_loss_gradient_and_metrics_equal_trl(case):
    given, params = REFERENCE["inputs"], case["params"]
    inputs = {
        "logps": given["per_token_logps"],
        "old_logps": given["old_per_token_logps"] if case["old_given"] else None,
        "ref_logps": given["ref_per_token_logps"] if case["ref_given"] else None,
        "entropies": given["entropies"],
        "advantages": given["advantages"],
        "mask": given["completion_mask"],
    }
    loss, grad, _, metrics = value_and_grads(
        inputs, loss_type=params["loss_type"], importance_sampling_level=params["importance_sampling_level"],
        clip_eps=params["epsilon"], clip_eps_high=params["epsilon_high"], delta=params["delta"], kl_coeff=params["beta"],
        use_bias_correction_kl=params["use_bias_correction_kl"], max_completion_length=params["max_completion_length"],
        num_items=params["num_items_in_batch"],
    )  # fmt: skip
    assert_loss(loss, case["loss"])
    assert_grad(grad, case["grad"])
    assert set(case["metrics"]) <= set(metrics)
    for name, wanted in case["metrics"].items():
        assert metrics[name] == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("case", ADVANTAGES, ids=lambda case: case["name"])
def test_advantages_equal_trl(case):
    per_function = [[np.nan if r is None else r for r in rewards] for rewards in case["rewards_per_func"].values()]
    rewards = np.array(per_function, dtype=float).reshape(len(per_function), -1, case["num_generations"])
    weights = case["reward_weights"] or [1.0] * len(per_function)
    _, advantages = combine_rewards(rewards, weights, MLXGRPOConfig(scale_rewards=case["scale_rewards"]))
    np.testing.assert_allclose(np.array(advantages).reshape(-1), case["advantages"], atol=2e-6, rtol=1e-5)


# A second implementation, in float64, straight from the formulas. Gradients are exact: a complex step of 1e-30 has no
# truncation error, `held` takes the place of stop_grad, and comparisons look at real parts.


def smaller(a, b):
    return np.where(np.real(a) <= np.real(b), a, b)


def larger(a, b):
    return np.where(np.real(a) >= np.real(b), a, b)


def clamp(x, low, high):
    return np.where(np.real(x) < low, low, np.where(np.real(x) > high, high, x))


def second_loss(
    L, O, A, M, R=None, S=None, H=None, *, loss_type="grpo", importance_sampling_level="token", clip_eps=0.2, clip_eps_high=None,
    delta=None, kl_coeff=0.0, max_completion_length=None, num_items=None, use_bias_correction_kl=False, top_entropy_quantile=1.0,
    entropy_coef=0.0, off_policy_mask_threshold=None, sampler_correction=None, sampler_correction_min=None,
    sampler_correction_max=3.0, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
    vespo_k_neg=3.0, vespo_lambda_neg=2.0,
):  # fmt: skip
    M = np.asarray(M, float)
    zeroed = lambda x: None if x is None else np.where(M > 0, x, 0.0)  # noqa: E731
    L, O, R, S, H = (zeroed(x) for x in (L, O, R, S, H))
    held = L.real
    O = held if O is None else O
    A = np.asarray(A, float)[:, None]
    n = M.sum(1, keepdims=True)
    high = clip_eps if clip_eps_high is None else clip_eps_high

    kept = M
    if top_entropy_quantile < 1 and M.any():
        kept = M * (H.real >= np.quantile(H.real[M > 0], 1 - top_entropy_quantile))
    c = None
    if sampler_correction and S is not None:
        level, action = sampler_correction.split("_")
        log_ratio = (O - S) * M
        c = np.exp(log_ratio if level == "token" else log_ratio.sum(1, keepdims=True))
        low, top = sampler_correction_min or 0.0, np.inf if sampler_correction_max is None else sampler_correction_max
        c = np.clip(c, low, top) if action == "truncate" else c * ((c >= low) & (c <= top))

    r = np.exp(L - O) if importance_sampling_level == "token" else np.exp(((L - O) * M).sum(1, keepdims=True) / np.maximum(n, 1))
    if loss_type == "cispo":
        loss = -np.minimum(r.real, high) * A * L
    elif loss_type == "sapo":
        t = np.where(A > 0, sapo_temperature_pos, sapo_temperature_neg)
        loss = -(4 / t) / (1 + np.exp(-t * (r - 1))) * A
    elif loss_type == "vespo":
        log_w = (np.clip(held - O, -20, 20) * M).sum(1, keepdims=True)
        if c is not None:
            with np.errstate(divide="ignore"):
                log_w = log_w + (np.clip(np.log(c), np.log(1e-8), 20) * M).sum(1, keepdims=True)
        log_w = np.clip(log_w, np.log(1e-8), 20)
        k = np.where(A >= 0, vespo_k_pos, vespo_k_neg)
        lam = np.where(A >= 0, vespo_lambda_pos, vespo_lambda_neg)
        loss = -np.exp(lam + k * log_w - lam * np.exp(log_w)) * A * L
    elif loss_type == "gmpo":  # the row's own term, on each kept token such that the mean over n is the term
        clipped = np.where(A > 0, smaller(L - O, high), larger(L - O, -clip_eps))
        kept_tokens = np.maximum(kept.sum(1, keepdims=True), 1)
        loss = -np.exp((clipped * kept).sum(1, keepdims=True) / kept_tokens) * A * n / kept_tokens
    else:
        bounded = r if delta is None else smaller(r, delta)
        loss = -smaller(bounded * A, clamp(r, 1 - clip_eps, 1 + high) * A)
    loss = loss * kept
    if off_policy_mask_threshold is not None:
        gap = (((O if S is None else S) - held) * M).sum(1, keepdims=True) / np.maximum(n, 1)
        loss = loss * ((A >= 0) | (gap <= off_policy_mask_threshold))
    if c is not None and loss_type != "vespo":
        loss = loss * c
    if kl_coeff > 0:
        kl = np.exp(R - L) - (R - L) - 1
        loss = loss + kl_coeff * kl * (r if use_bias_correction_kl else 1)

    s = loss * M
    bonus = entropy_coef * (H * kept).sum() / max(kept.sum(), 1) if entropy_coef else 0.0
    if loss_type in ("grpo", "sapo", "gmpo"):
        return (s.sum(1, keepdims=True) / np.maximum(n, 1)).mean() - bonus
    if loss_type == "bnpo":
        return s.sum() / max(M.sum(), 1) - bonus
    if loss_type == "dr_grpo":
        return s.sum() / (len(M) * (max_completion_length or M.shape[1])) - bonus
    if loss_type == "luspo":
        return s.sum(1).mean() - bonus
    return s.sum() / max(M.sum() if num_items is None else num_items, 1) - bonus


def second_value_and_grads(inputs: dict, **options):
    """(loss, gradient by logps, gradient by entropies) of second_loss."""
    L, O, R, S, H, A, M = (None if inputs.get(name) is None else np.asarray(inputs[name], float) for name in NAMES)
    H = np.zeros_like(L) if H is None else H
    by_logps, by_entropies = np.zeros_like(L), np.zeros_like(L)
    for place in np.ndindex(L.shape):
        step = np.zeros(L.shape, complex)
        step[place] = 1e-30j
        by_logps[place] = np.imag(second_loss(L + step, O, A, M, R, S, H, **options)) / 1e-30
        if options.get("entropy_coef"):
            by_entropies[place] = np.imag(second_loss(L + 0j, O, A, M, R, S, H + step, **options)) / 1e-30
    return np.real(second_loss(L + 0j, O, A, M, R, S, H, **options)), by_logps, by_entropies


def make_inputs(seed=0, rows=6, width=7, spread=0.5, advantages=None) -> dict:
    """Random float32 inputs; one row is wholly masked, one has one token, one has no advantage, padding is garbage."""
    rng = np.random.default_rng(seed)
    draw = lambda scale, low=0.0: (low + scale * rng.standard_normal((rows, width))).astype(np.float32)  # noqa: E731
    logps = np.minimum(draw(1.0, -1.5), -0.01)
    lengths = rng.integers(2, width + 1, rows)
    lengths[:3] = width, 1, 0
    if advantages is None:
        advantages = rng.standard_normal(rows).astype(np.float32)
        advantages[-1] = 0.0
    inputs = {
        "logps": logps,
        "old_logps": logps + draw(spread),
        "ref_logps": logps + draw(spread),
        "sampler_logps": logps + draw(spread),
        "entropies": np.abs(draw(1.0, 1.5)),
        "advantages": np.array(advantages, np.float32),
        "mask": (np.arange(width) < lengths[:, None]).astype(np.float32),
    }
    for name in NAMES[:5]:
        inputs[name] = np.where(inputs["mask"] > 0, inputs[name], draw(30.0)).astype(np.float32)
    return inputs


BASE = {"max_completion_length": 9, "num_items": 40, "clip_eps_high": 0.3}
ASIDE = {  # options that no reference figure covers, each alone and in company
    "delta": {"delta": 1.25},
    "delta below the clip": {"delta": 0.9},
    "clip higher": {"clip_eps": 0.1, "clip_eps_high": 0.6},
    "cispo bound": {"clip_eps_high": 5.0},
    "tight cispo bound": {"clip_eps_high": 1.1},
    "gmpo's range": {"clip_eps": 0.4, "clip_eps_high": 0.5},
    "vespo's constants": {"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.0, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.0},
    "sapo temperatures": {"sapo_temperature_pos": 2.5, "sapo_temperature_neg": 0.4},
    "kl": {"kl_coeff": 0.1},
    "bias corrected kl": {"kl_coeff": 0.1, "use_bias_correction_kl": True},
    "top entropy": {"top_entropy_quantile": 0.35},
    "off policy mask": {"off_policy_mask_threshold": 0.05},
    "strict off policy mask": {"off_policy_mask_threshold": 0.0},
    "entropy bonus": {"entropy_coef": 0.03},
    **{name: {"sampler_correction": name, "sampler_correction_max": 1.3} for name in CORRECTIONS},
    **{f"{name}, both ends": {"sampler_correction": name, "sampler_correction_min": 0.8, "sampler_correction_max": 1.4} for name in CORRECTIONS},
    **{f"{name}, no upper end": {"sampler_correction": name, "sampler_correction_min": 0.9, "sampler_correction_max": None} for name in CORRECTIONS},
    "masks and kl": {"kl_coeff": 0.2, "top_entropy_quantile": 0.5, "off_policy_mask_threshold": 0.02},
    "all at once": {
        "delta": 1.4, "kl_coeff": 0.07, "use_bias_correction_kl": True, "top_entropy_quantile": 0.6, "entropy_coef": 0.02,
        "off_policy_mask_threshold": 0.1, "sampler_correction": "token_truncate", "sampler_correction_max": 1.2,
    },
    "all at once, masked by token": {
        "kl_coeff": 0.07, "top_entropy_quantile": 0.6, "entropy_coef": 0.02, "off_policy_mask_threshold": 0.1,
        "sampler_correction": "token_mask", "sampler_correction_min": 0.5, "sampler_correction_max": 1.5,
    },
    "all at once, by sequence": {
        "kl_coeff": 0.07, "top_entropy_quantile": 0.8, "entropy_coef": 0.02, "off_policy_mask_threshold": 0.3,
        "sampler_correction": "sequence_mask", "sampler_correction_min": 0.2, "sampler_correction_max": 4.0,
    },
}  # fmt: skip


def is_refused(loss_type, options):
    """VESPO takes a sampler correction token by token."""
    return loss_type == "vespo" and options.get("sampler_correction") in mlx_grpo.SEQUENCE_CORRECTIONS


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradients_equal_a_second_implementation(loss_type, level):
    for seed, (name, aside) in enumerate(ASIDE.items()):
        if is_refused(loss_type, aside):
            continue
        options = {**BASE, "loss_type": loss_type, "importance_sampling_level": level, **aside}
        for old in (True, False):
            inputs = make_inputs(seed)
            if not old:
                inputs["old_logps"] = None
            loss, by_logps, by_entropies, _ = value_and_grads(inputs, **options)
            wanted = second_value_and_grads(inputs, **options)
            try:
                assert_loss(loss, wanted[0])
                assert_grad(by_logps, wanted[1])
                assert_grad(by_entropies, wanted[2])
            except AssertionError as error:
                raise AssertionError(f"{name}, old log-probs {'given' if old else 'absent'}: {error}") from None


@pytest.mark.parametrize("case", REFERENCE["cases"][::3], ids=lambda case: case["name"])
def test_the_second_implementation_equals_trl_too(case):
    given, params = REFERENCE["inputs"], case["params"]
    inputs = dict(zip(NAMES, (given["per_token_logps"], given["old_per_token_logps"] if case["old_given"] else None,
                              given["ref_per_token_logps"], None, given["entropies"], given["advantages"], given["completion_mask"])))  # fmt: skip
    loss, grad, _ = second_value_and_grads(
        inputs, loss_type=params["loss_type"], importance_sampling_level=params["importance_sampling_level"], kl_coeff=params["beta"],
        use_bias_correction_kl=params["use_bias_correction_kl"], max_completion_length=16, num_items=params["num_items_in_batch"],
    )  # fmt: skip
    assert_loss(loss, case["loss"])
    assert_grad(grad, case["grad"])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6), loss_type=st.sampled_from(LOSSES), level=st.sampled_from(LEVELS), spread=st.sampled_from([0.01, 0.5, 2.0]),
    kl_coeff=st.sampled_from([0.0, 0.05]), correction=st.sampled_from([None, *CORRECTIONS]), delta=st.sampled_from([None, 1.5]),
    share=st.sampled_from([1.0, 0.2, 0.9]), biased=st.booleans(),
)  # fmt: skip
def test_any_combination_equals_the_second_implementation(seed, loss_type, level, spread, kl_coeff, correction, delta, share, biased):
    hypothesis.assume(not is_refused(loss_type, {"sampler_correction": correction}))
    inputs = make_inputs(seed, rows=4, width=5, spread=spread)
    options = {**BASE, "loss_type": loss_type, "importance_sampling_level": level, "kl_coeff": kl_coeff, "delta": delta,
               "sampler_correction": correction, "use_bias_correction_kl": biased, "top_entropy_quantile": share}  # fmt: skip
    loss, grad, _, _ = value_and_grads(inputs, **options)
    wanted_loss, wanted_grad, _ = second_value_and_grads(inputs, **options)
    assert loss == pytest.approx(wanted_loss, abs=2e-6, rel=2e-5)
    np.testing.assert_allclose(grad, wanted_grad, atol=1e-6, rtol=1e-4)


# By hand. Two tokens with ratios 3/2 and 1/2, clip_eps 0.2.

HALVES = {"logps": np.log([[0.6, 0.2]]), "old_logps": np.log([[0.4, 0.4]]), "mask": [[1, 1]]}


def by_hand(advantage, **options):
    loss, grad, _, metrics = value_and_grads({**HALVES, "advantages": [advantage], "entropies": options.pop("entropies", None), **options.pop("more", {})}, **options)
    return loss, grad[0], metrics


def test_a_good_answer_is_clipped_above_and_a_bad_one_below():
    loss, grad, metrics = by_hand(1.0)
    assert loss == pytest.approx(-(1.2 + 0.5) / 2)
    assert grad == pytest.approx([0.0, -0.25], abs=1e-6)  # r A / 2 where it is not clipped
    assert metrics["clip_ratio/high_mean"] == 0.5 and metrics["clip_ratio/low_mean"] == 0
    loss, grad, metrics = by_hand(-1.0)
    assert loss == pytest.approx((1.5 + 0.8) / 2)
    assert grad == pytest.approx([0.75, 0.0], abs=1e-6)
    assert metrics["clip_ratio/low_mean"] == 0.5 and metrics["clip_ratio/high_mean"] == 0
    assert metrics["clip_ratio/region_mean"] == 0.5


def test_delta_bounds_the_ratio_of_a_bad_answer():
    loss, grad, _ = by_hand(-1.0, delta=1.3)
    assert loss == pytest.approx((1.3 + 0.8) / 2)
    assert grad == pytest.approx([0.0, 0.0], abs=1e-7)
    assert by_hand(1.0, delta=1.3)[0] == by_hand(1.0)[0]


def test_clip_higher_lets_a_good_answer_rise_further():
    assert by_hand(1.0, clip_eps_high=0.4)[0] == pytest.approx(-(1.4 + 0.5) / 2)
    assert by_hand(1.0, clip_eps_high=0.6)[0] == pytest.approx(-(1.5 + 0.5) / 2)


def test_the_sequence_ratio_is_the_geometric_mean():
    ratio = math.sqrt(1.5 * 0.5)  # 0.866
    loss, grad, metrics = by_hand(1.0, importance_sampling_level="sequence")
    assert loss == pytest.approx(-ratio)
    assert grad == pytest.approx([-ratio / 2, -ratio / 2])  # each token moves the one ratio by half
    assert metrics["clip_ratio/region_mean"] == 0
    assert by_hand(-1.0, importance_sampling_level="sequence", clip_eps=0.1)[0] == pytest.approx(0.9)


def test_the_normalisers_by_hand():
    sums = -(1.2 + 0.5)
    assert by_hand(1.0, loss_type="bnpo")[0] == pytest.approx(sums / 2)
    assert by_hand(1.0, loss_type="dr_grpo", max_completion_length=10)[0] == pytest.approx(sums / 10)
    assert by_hand(1.0, loss_type="dapo", num_items=8)[0] == pytest.approx(sums / 8)
    assert by_hand(1.0, loss_type="luspo")[0] == pytest.approx(sums)


def test_cispo_weighs_the_log_probs_by_the_bounded_ratio():
    loss, grad, metrics = by_hand(2.0, loss_type="cispo", clip_eps_high=1.1, num_items=2)
    assert loss == pytest.approx(-(1.1 * math.log(0.6) + 0.5 * math.log(0.2)))
    assert grad == pytest.approx([-1.1, -0.5])  # no token loses its gradient
    assert metrics["cispo_clip_ratio"] == 0.5
    assert by_hand(2.0, loss_type="cispo", clip_eps_high=5.0, num_items=2)[1] == pytest.approx([-1.5, -0.5])


def test_sapo_by_hand():
    gate = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert by_hand(1.0, loss_type="sapo")[0] == pytest.approx(-4 * (gate(0.5) + gate(-0.5)) / 2)
    wanted = 4 / 2.0 * (gate(2.0 * 0.5) + gate(2.0 * -0.5)) / 2
    assert by_hand(-1.0, loss_type="sapo", sapo_temperature_neg=2.0)[0] == pytest.approx(wanted)


def test_vespo_by_hand():
    w = 0.75
    good, bad = math.exp(3 + 2 * math.log(w) - 3 * w), math.exp(2 + 3 * math.log(w) - 2 * w)
    logps = math.log(0.6) + math.log(0.2)
    assert by_hand(1.0, loss_type="vespo", num_items=4)[0] == pytest.approx(-good * logps / 4)
    loss, grad, metrics = by_hand(-1.0, loss_type="vespo", num_items=4)
    assert loss == pytest.approx(bad * logps / 4)
    assert grad == pytest.approx([bad / 4, bad / 4])
    assert metrics["vespo/phi_seq_mean"] == pytest.approx(bad)


def test_vespo_takes_no_sequence_for_less_likely_than_1e_minus_8():
    rows = {"logps": [[-30.0]], "old_logps": [[-5.0]], "mask": [[1]]}
    for advantage, k, lam in ((1.0, 2, 3), (-1.0, 3, 2)):
        _, _, _, metrics = value_and_grads({**rows, "advantages": [advantage]}, loss_type="vespo")
        assert metrics["vespo/phi_seq_mean"] == pytest.approx(math.exp(lam + k * math.log(1e-8) - lam * 1e-8), rel=1e-4)


def test_vespos_weight_has_the_samplers_correction_in_it():
    more = {"sampler_logps": HALVES["old_logps"] - np.log([[4.0, 0.5]])}  # the policy was 4 and 1/2 times as likely
    phi = lambda w: math.exp(3 + 2 * math.log(w) - 3 * w)  # noqa: E731
    logps = math.log(0.6) + math.log(0.2)
    for mode, w in (("token_truncate", 0.75 * 3.0 * 0.5), ("token_mask", 0.75 * 1e-8 * 0.5)):
        loss, _, metrics = by_hand(1.0, loss_type="vespo", sampler_correction=mode, sampler_correction_max=3.0, more=more)
        assert metrics["vespo/phi_seq_mean"] == pytest.approx(phi(max(w, 1e-8)), rel=1e-5)
        assert loss == pytest.approx(-phi(max(w, 1e-8)) * logps / 2, rel=1e-5)  # nothing is multiplied onto the term
    with pytest.raises(ValueError, match="loss_type vespo takes a correction by token, not 'sequence_mask'"):
        by_hand(1.0, loss_type="vespo", sampler_correction="sequence_mask", more=more)


def test_vespos_constants_are_options():
    w = 0.75
    constants = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 4.0, "vespo_lambda_neg": 1.5}
    assert by_hand(1.0, loss_type="vespo", **constants)[2]["vespo/phi_seq_mean"] == pytest.approx(w * math.exp(0.5 - 0.5 * w))
    assert by_hand(-1.0, loss_type="vespo", **constants)[2]["vespo/phi_seq_mean"] == pytest.approx(w**4 * math.exp(1.5 - 1.5 * w))


def test_gmpo_clips_each_token_in_log_space_and_takes_their_geometric_mean():
    # ratios 3/2 = e^0.405 and 1/2 = e^-0.693; the range is e^-0.4 to e^0.4
    mean = math.exp((0.4 + math.log(0.5)) / 2)  # a good answer is clipped above alone
    loss, grad, metrics = by_hand(2.0, loss_type="gmpo", clip_eps=0.4)
    assert loss == pytest.approx(-2 * mean)
    assert grad == pytest.approx([0.0, -2 * mean / 2], abs=1e-6)
    assert metrics["clip_ratio/high_mean"] == 0.5 and metrics["clip_ratio/low_mean"] == 0
    mean = math.exp((math.log(1.5) - 0.4) / 2)  # and a bad one below
    loss, grad, metrics = by_hand(-1.0, loss_type="gmpo", clip_eps=0.4)
    assert loss == pytest.approx(mean)
    assert grad == pytest.approx([mean / 2, 0.0], abs=1e-6)
    assert metrics["clip_ratio/low_mean"] == 0.5 and metrics["clip_ratio/high_mean"] == 0


def test_gmpo_averages_rows_alike_whatever_their_length():
    rows = {"logps": np.log([[0.6, 0.2], [0.5, 0.5]]), "old_logps": np.log([[0.5, 0.25], [0.4, 0.1]]), "mask": [[1, 1], [1, 0]]}
    loss, grad, _, _ = value_and_grads({**rows, "advantages": [1.0, -3.0]}, loss_type="gmpo", clip_eps=0.4)
    first, second = math.sqrt(1.2 * 0.8), 1.25
    assert loss == pytest.approx((-first + 3 * second) / 2)
    assert grad.ravel() == pytest.approx([-first / 4, -first / 4, 3 * second / 2, 0.0])


def test_tokens_that_the_entropy_mask_drops_leave_gmpos_mean():
    loss, grad, _ = by_hand(1.0, loss_type="gmpo", clip_eps=0.4, entropies=[[0.1, 0.9]], top_entropy_quantile=0.5)
    assert loss == pytest.approx(-0.5) and grad == pytest.approx([0.0, -0.5])  # the second token's ratio alone


def test_the_kl_estimate_by_hand():
    more = {"ref_logps": np.log([[0.3, 0.4]])}  # half and twice the policy
    k = [0.5 - math.log(0.5) - 1, 2 - math.log(2) - 1]
    loss, grad, metrics = by_hand(0.0, kl_coeff=0.1, more=more)
    assert metrics["kl"] == pytest.approx(sum(k) / 2, rel=1e-5)
    assert loss == pytest.approx(0.1 * sum(k) / 2, rel=1e-5)
    assert grad == pytest.approx([0.1 * (1 - 0.5) / 2, 0.1 * (1 - 2) / 2], rel=1e-5)
    loss, _, metrics = by_hand(0.0, kl_coeff=0.1, use_bias_correction_kl=True, more=more)
    assert metrics["kl"] == pytest.approx((1.5 * k[0] + 0.5 * k[1]) / 2, rel=1e-5)
    assert loss == pytest.approx(0.1 * (1.5 * k[0] + 0.5 * k[1]) / 2, rel=1e-5)


def test_the_sampler_corrections_by_hand():
    log_ratio, mask = mx.log(mx.array([[4.0, 0.5]])), mx.ones((1, 2))
    for mode, low, high, wanted in (
        ("token_truncate", None, 3.0, [[3.0, 0.5]]),
        ("token_truncate", 0.75, 3.0, [[3.0, 0.75]]),
        ("token_mask", None, 3.0, [[0.0, 0.5]]),
        ("token_mask", 0.75, 5.0, [[4.0, 0.0]]),
        ("sequence_truncate", None, 1.5, [[1.5]]),
        ("sequence_truncate", 2.5, 3.0, [[2.5]]),
        ("sequence_mask", None, 1.5, [[0.0]]),
        ("sequence_mask", 1.5, 3.0, [[2.0]]),
        ("sequence_mask", 2.5, 3.0, [[0.0]]),
    ):
        np.testing.assert_allclose(np.array(correction_weights(log_ratio, mask, mode, low, high)), wanted, rtol=1e-6)


def test_the_off_policy_mask_drops_bad_rows_that_the_policy_left():
    rows = {"logps": [[-2.0], [-2.0], [-1.0]], "old_logps": None, "sampler_logps": [[-1.0], [-1.0], [-1.5]], "mask": [[1], [1], [1]]}
    _, grad, _, _ = value_and_grads({**rows, "advantages": [1.0, -1.0, -1.0]}, off_policy_mask_threshold=0.5)
    assert grad[:, 0] == pytest.approx([-1 / 3, 0.0, 1 / 3])  # gaps 1, 1 and -0.5; the first is a good answer


def test_the_top_entropy_mask_keeps_the_uncertain_share():
    rows = {"logps": [[-1.0] * 5], "old_logps": None, "entropies": [[0.1, 0.9, 0.5, 0.3, 0.7]], "mask": [[1] * 5], "advantages": [1.0]}
    _, grad, _, _ = value_and_grads(rows, top_entropy_quantile=0.5)
    assert grad[0] == pytest.approx([0, -0.2, -0.2, 0, -0.2])  # the median stays in; the divisor counts all five


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_entropy_bonus_is_the_mean_entropy_of_a_trained_token_whatever_the_loss(loss_type):
    rows = {"logps": [[-1.0] * 3] * 2, "mask": [[1, 1, 1], [1, 0, 0]], "advantages": [0.0, 0.0]}
    rows["entropies"] = [[1.0, 3.0, 2.0], [6.0, 9.0, 9.0]]
    for coef in (0.1, mx.array(0.1)):  # an array where it changes between steps
        loss, _, by_entropies, metrics = value_and_grads(rows, loss_type=loss_type, entropy_coef=coef, num_items=99, max_completion_length=50)
        assert loss == pytest.approx(-0.1 * 12 / 4)
        assert by_entropies.ravel() == pytest.approx([-0.025, -0.025, -0.025, -0.025, 0, 0])
        assert metrics["entropy"] == metrics["entropy_trained"] == pytest.approx(3.0)
    loss, _, by_entropies, metrics = value_and_grads(rows, loss_type=loss_type, entropy_coef=0.1, top_entropy_quantile=0.5)
    assert loss == pytest.approx(-0.1 * 9 / 2)  # those of at least the median, 2.5
    assert by_entropies.ravel() == pytest.approx([0, -0.05, 0, -0.05, 0, 0])
    assert metrics["entropy"] == pytest.approx(3.0) and metrics["entropy_trained"] == pytest.approx(4.5)


def test_the_adaptive_entropy_coefficient_by_hand():
    config = MLXGRPOConfig(use_adaptive_entropy=True, entropy_target=0.5, entropy_coef_delta=0.01, entropy_coef_min=0.02, entropy_coef_max=0.04)
    assert next_entropy_coef(0.025, 0.5, config) == pytest.approx(0.035)  # at the target it rises
    assert next_entropy_coef(0.035, 0.2, config) == 0.04
    assert next_entropy_coef(0.035, 0.51, config) == pytest.approx(0.025)
    assert next_entropy_coef(0.025, 0.51, config) == 0.02


def test_advantages_of_single_tokens_are_taken_too():
    loss, grad, metrics = by_hand([1.0, -1.0])
    assert loss == pytest.approx((-1.2 + 0.8) / 2) and grad == pytest.approx([0.0, 0.0], abs=1e-7)
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.5


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_the_masked_quantile_keeps_as_many_as_numpy_does(share):
    rng = np.random.default_rng(1)
    for n in range(1, 120):
        values = rng.standard_normal((1, n)).astype(np.float32)
        found = masked_quantile(mx.array(np.hstack([values, [[9.0, np.nan]]])), mx.array([[True] * n + [False, False]]), 1 - share)
        wanted = np.quantile(values.astype(float), 1 - share)
        assert found.item() == pytest.approx(wanted, abs=1e-5)
        place = (1 - share) * (n - 1)
        if abs(place - round(place)) > 1e-4:  # on a value itself, float32 may fall to either side, as torch's does
            assert (values >= np.float32(found.item())).sum() == (values >= wanted).sum(), f"{n} values"


# On the policy itself


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_on_policy_the_ratio_is_1_and_the_gradient_is_not_0(loss_type, level):
    inputs = {**make_inputs(3), "old_logps": None}
    options = {**BASE, "loss_type": loss_type, "importance_sampling_level": level, "clip_eps_high": 5.0 if loss_type == "cispo" else None}
    loss, grad, _, metrics = value_and_grads(inputs, **options)
    mask, advantages = inputs["mask"], inputs["advantages"][:, None]
    per_token = {"grpo": 6 * np.maximum(mask.sum(1, keepdims=True), 1), "bnpo": mask.sum(), "dr_grpo": 6 * 9, "luspo": 6}
    divisor = per_token.get("grpo" if loss_type in ("sapo", "gmpo") else loss_type, 40)
    wanted = -advantages * mask / divisor  # the policy gradient, in every variant
    if loss_type == "luspo" and level == "sequence":
        wanted = -advantages * mask / 6
    assert_grad(grad, wanted)
    assert np.any(wanted)
    assert all(value == 0 for name, value in metrics.items() if "clip_ratio" in name)
    again = value_and_grads({**inputs, "old_logps": inputs["logps"]}, **options)
    assert again[0] == loss
    assert_grad(again[1], grad)


@pytest.mark.parametrize("level", LEVELS)
def test_off_policy_every_loss_has_a_gradient_of_its_own(level):
    inputs = make_inputs(4, rows=8, spread=0.8)
    grads = {}
    for loss_type in LOSSES:
        options = {**BASE, "loss_type": loss_type, "importance_sampling_level": level, "clip_eps_high": 5.0 if loss_type == "cispo" else 0.3}
        grads[loss_type] = value_and_grads(inputs, **options)[1]
    for (one, a), (other, b) in itertools.combinations(grads.items(), 2):
        assert np.abs(a - b).max() > 1e-4, f"{one} and {other}"


@pytest.mark.parametrize("loss_type", [name for name, loss in mlx_grpo.LOSSES.items() if not loss.whole_rows])
def test_token_and_sequence_level_differ(loss_type):
    inputs = make_inputs(5, rows=8, spread=0.8)
    options = {**BASE, "loss_type": loss_type, "clip_eps_high": 5.0 if loss_type == "cispo" else 0.3}
    token, sequence = (value_and_grads(inputs, **options, importance_sampling_level=level)[1] for level in LEVELS)
    assert np.abs(token - sequence).max() > 1e-4


def test_every_option_of_the_objective_is_among_those_compared():
    options = set(grpo_loss.__kwdefaults__) - set(NAMES) - {"loss_type", "importance_sampling_level", "entropy_mask", "totals"}
    assert options == set(BASE).union(*ASIDE.values())


# What must not matter



def everything(loss_type, level="token"):
    correction = "token_truncate" if loss_type == "vespo" else "sequence_truncate"
    return {**BASE, "loss_type": loss_type, "importance_sampling_level": level, "kl_coeff": 0.1, "use_bias_correction_kl": True,
            "top_entropy_quantile": 0.7, "entropy_coef": 0.05, "off_policy_mask_threshold": 0.3, "sampler_correction": correction}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_what_stands_in_the_padding_does_not_matter(loss_type, level, garbage):
    inputs = make_inputs(7)
    options = everything(loss_type, level)
    wanted = value_and_grads(inputs, **options)
    for names in [NAMES[:5], *((name,) for name in NAMES[:5])]:
        dirty = {**inputs, **{name: np.where(inputs["mask"] > 0, inputs[name], garbage) for name in names}}
        loss, grad, by_entropies, metrics = value_and_grads(dirty, **options)
        assert loss == wanted[0]
        np.testing.assert_array_equal(grad, wanted[1])
        np.testing.assert_array_equal(by_entropies, wanted[2])
        assert metrics == wanted[3]
    assert (wanted[1][inputs["mask"] == 0] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_more_padding_does_not_matter(loss_type, level):
    inputs = make_inputs(8)
    wider = {n: x if n == "advantages" else np.pad(x, ((0, 0), (0, 5)), constant_values=0 if n == "mask" else -3) for n, x in inputs.items()}
    options = everything(loss_type, level)
    loss, grad, _, metrics = value_and_grads(wider, **options)
    wanted_loss, wanted_grad, _, wanted_metrics = value_and_grads(inputs, **options)
    assert_loss(loss, wanted_loss)
    assert_grad(grad[:, : wanted_grad.shape[1]], wanted_grad)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_order_of_rows_does_not_matter(loss_type, level):
    inputs, order = make_inputs(9), np.random.default_rng(0).permutation(6)
    options = everything(loss_type, level)
    loss, grad, _, metrics = value_and_grads({name: x[order] for name, x in inputs.items()}, **options)
    wanted_loss, wanted_grad, _, wanted_metrics = value_and_grads(inputs, **options)
    assert_loss(loss, wanted_loss)
    assert_grad(grad, wanted_grad[order])
    assert metrics == pytest.approx(wanted_metrics, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", [mx.bool_, mx.int32, mx.float32, mx.bfloat16])
def test_the_type_of_the_mask_does_not_matter(kind):
    inputs = make_inputs(10)
    logps, old, advantages, mask = (mx.array(inputs[name]) for name in ("logps", "old_logps", "advantages", "mask"))
    assert grpo_loss(logps, old, advantages, mask.astype(kind))[0].item() == grpo_loss(logps, old, advantages, mask)[0].item()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_batch_without_trained_tokens_has_loss_and_gradient_0(loss_type):
    inputs = make_inputs(11)
    inputs["mask"] = np.zeros_like(inputs["mask"])
    loss, grad, by_entropies, metrics = value_and_grads(inputs, **everything(loss_type))
    assert loss == 0 and not grad.any() and not by_entropies.any()
    assert all(map(math.isfinite, metrics.values()))


def test_the_gradient_does_not_flow_into_anything_but_the_policy():
    inputs = {name: mx.array(x) for name, x in make_inputs(12).items()}
    for loss_type in LOSSES:
        loss = lambda s: grpo_loss(inputs["logps"], inputs["old_logps"], inputs["advantages"], inputs["mask"], sampler_logps=s,
                                   sampler_correction="token_truncate", loss_type=loss_type)[0]  # noqa: B023, E731  # fmt: skip
        assert not mx.any(mx.grad(loss)(inputs["sampler_logps"])).item()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("extreme", [12.0, -12.0, 100.0, -100.0])
def test_extreme_ratios_stay_finite(loss_type, level, extreme):
    inputs = make_inputs(13, advantages=[1.0, -1.0, 0.5, -2.0, 1.5, 0.0])
    for name in ("old_logps", "ref_logps", "sampler_logps"):
        shifted = np.round(4 * inputs["logps"]) / 4 - extreme
        dirty = {**inputs, "logps": np.round(4 * inputs["logps"]) / 4, name: shifted}
        options = {**BASE, "loss_type": loss_type, "importance_sampling_level": level, "kl_coeff": 0.1, "sampler_correction": "token_truncate"}
        for biased in (False, True):
            loss, grad, _, metrics = value_and_grads(dirty, **options, use_bias_correction_kl=biased)
            assert math.isfinite(loss) and np.isfinite(grad).all() and all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_ratios_of_e_to_12_are_still_exact(loss_type, level):
    inputs = make_inputs(14, advantages=[1.0, -1.0, 0.5, -2.0, 1.5, 0.0])
    inputs["logps"] = np.round(4 * inputs["logps"]) / 4
    signs = np.random.default_rng(0).choice([-12.0, 12.0], (1 if level == "token" else 6, 7 if level == "token" else 1))
    inputs["old_logps"] = inputs["logps"] + signs
    options = {**BASE, "loss_type": loss_type, "importance_sampling_level": level}
    loss, grad, _, _ = value_and_grads(inputs, **options)
    wanted_loss, wanted_grad, _ = second_value_and_grads(inputs, **options)
    assert_loss(loss, wanted_loss)
    assert_grad(grad, wanted_grad)

    for gap in (12.0, -12.0):
        shifted = {**inputs, "old_logps": None, "ref_logps": inputs["logps"] + gap}
        loss, grad, _, _ = value_and_grads(shifted, **options, kl_coeff=0.1)
        wanted_loss, wanted_grad, _ = second_value_and_grads(shifted, **options, kl_coeff=0.1)
        assert_loss(loss, wanted_loss)
        assert_grad(grad, wanted_grad)


# Parts of an update add up to the whole


def totals_of(mask, kept=None):
    counts = {"rows": len(mask), "tokens": mask.sum(), "entropy_tokens": (mask if kept is None else kept).sum()}
    return {name: mx.array(float(n)) for name, n in counts.items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_parts_add_up_to_the_whole_and_so_do_their_metrics(loss_type, level):
    inputs = make_inputs(15, rows=9)
    mask = inputs["mask"]
    options = everything(loss_type, level)
    whole_loss, whole_grad, whole_by_entropies, whole_metrics = value_and_grads(inputs, **options)
    kept = mask * (inputs["entropies"] >= np.quantile(inputs["entropies"][mask > 0], 0.3))
    options["totals"] = totals_of(mask, kept)
    by_row = level == "sequence" and not mlx_grpo.LOSSES[loss_type].whole_rows
    for cuts in ([4], [1, 2, 3], [2, 8], list(range(1, 9))):
        parts = np.split(np.arange(9), cuts)
        results = [
            value_and_grads({name: x[rows] for name, x in inputs.items()}, entropy_mask=mx.array(kept[rows]), **options) for rows in parts
        ]
        losses, grads, by_entropies, metrics = zip(*results)
        assert_loss(sum(losses), whole_loss)
        assert_grad(np.concatenate(grads), whole_grad)
        assert_grad(np.concatenate(by_entropies), whole_by_entropies)
        sizes = PartSizes(np.array([mask[rows].sum() for rows in parts]), np.array([len(rows) for rows in parts]), mask.sum(), 9, by_row)
        merged = merge_metrics(list(metrics), METRICS | mlx_grpo.LOSSES[loss_type].metrics, sizes)
        assert merged == pytest.approx(whole_metrics, rel=1e-5, abs=1e-7)


def make_groups(config, seed=0):
    """Four groups of ragged completions; the third has equal rewards, and a few rows were cut at the length limit."""
    rng = np.random.default_rng(seed)
    groups = []
    for b in range(4):
        completions = []
        for n in rng.integers(1, 20, config.num_generations):
            ids, reward = rng.integers(1, 50, n).tolist(), 1.0 if b == 2 else rng.random()
            reason = "length" if n > 15 else "eos"
            completions.append(mlx_grpo.Completion(ids, [-1.0] * n, [1] * n, reason, "", [reward]))
        groups.append(mlx_grpo.Group({}, rng.integers(1, 50, 3 + b).tolist(), completions))
    return groups


EXTRAS = {
    "plain": {},
    "kl": {"kl_coeff": 0.1},
    "entropy bonus": {"entropy_coef": 0.1},
    "truncated rows out": {"mask_truncated_completions": True},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce_plus_plus_baseline": {"advantage_estimator": "reinforce_plus_plus_baseline"},
    "maxrl": {"advantage_estimator": "maxrl"},
}


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_trainers_micro_batches_add_up_to_the_whole(loss_type, extra):
    whole_config = MLXGRPOConfig(num_generations=4, batch_size=4, loss_type=loss_type, max_completion_length=24, micro_batch_tokens=10**6, **extra)
    coefs = {"kl_coeff": whole_config.kl_coeff, "entropy_coef": whole_config.entropy_coef, "max_completion_length": 24}
    groups = make_groups(whole_config)
    rewards = np.array([[completion.rewards for completion in group.completions] for group in groups])  # (B, G, F)
    advantages = np.array(combine_rewards(rewards.transpose(2, 0, 1), [1.0], whole_config)[1])
    policy = mx.array(np.random.default_rng(1).standard_normal(50) - 2)  # log-prob of each id: as good as a model
    shift = mx.array(np.random.default_rng(2).standard_normal(50) * 0.3)

    def total(tokens_a_batch):
        config = dataclasses.replace(whole_config, micro_batch_tokens=tokens_a_batch)
        batches = mlx_grpo.micro_batches(groups, advantages, config, mlx_grpo.ALONE, True)

        def loss(policy):
            parts = []
            for batch in batches:
                logps = policy[batch["ids"]]
                old, ref = (mx.stop_gradient(logps + sign * shift[batch["ids"]]) for sign in (1, -1))
                part, _ = grpo_loss(logps, old, batch["advantages"], batch["mask"], ref_logps=ref, entropies=-logps,
                                    loss_type=loss_type, totals=batch["totals"], **coefs)  # fmt: skip
                parts.append(part)
            return sum(parts)

        return len(batches), *mx.value_and_grad(loss)(policy)

    # The whole, by the second implementation on all rows at once.
    ids, mask = np.zeros((16, 24), int), np.zeros((16, 24))
    for row, completion in enumerate(c for group in groups for c in group.completions):
        ids[row, : len(completion.ids)] = completion.ids
        is_left_out = whole_config.mask_truncated_completions and completion.finish_reason == "length"
        mask[row, : len(completion.ids)] = not is_left_out
    logps = np.array(policy, float)[ids]
    moved = np.array(shift, float)[ids]
    wanted = np.real(second_loss(logps + 0j, logps + moved, advantages.reshape(-1), mask, logps - moved, None, -logps, loss_type=loss_type, **coefs))
    counts, losses, grads = zip(*(total(tokens) for tokens in (10**6, 200, 60, 1)))
    assert counts[0] == 1 and counts[-1] > counts[1] > 1
    assert_loss(losses[0].item(), wanted)
    for loss, grad in zip(losses[1:], grads[1:]):
        assert_loss(loss.item(), losses[0].item())
        assert_grad(np.array(grad), np.array(grads[0]))


def test_metrics_are_merged_as_their_table_says():
    sizes = PartSizes(np.array([3, 1]), np.array([2, 2]), all_tokens=8, all_rows=5, by_row=False)
    values = {name: np.array([0.5, 0.25]) for name in "abcdef"}
    assert mlx_grpo.over_tokens(values["a"], sizes) == (1.5 + 0.25) / 4
    assert mlx_grpo.over_rows(values["b"], sizes) == (1.0 + 0.5) / 4
    assert mlx_grpo.over_ratios(values["c"], sizes) == (1.5 + 0.25) / 8  # of all tokens, with those of the row left out
    by_row = dataclasses.replace(sizes, by_row=True)
    assert mlx_grpo.over_ratios(values["c"], by_row) == (1.0 + 0.5) / 5
    assert mlx_grpo.highest(values["d"], sizes) == 0.5 and mlx_grpo.added(values["e"], sizes) == 0.75
    assert mlx_grpo.lowest(values["f"], sizes) == 0.0  # the fifth row's
    assert mlx_grpo.lowest(values["f"], dataclasses.replace(sizes, all_rows=4)) == 0.25
    no_tokens = dataclasses.replace(sizes, all_rows=4, tokens=np.array([3, 0]))
    assert mlx_grpo.lowest(values["f"], no_tokens) == 0.5


def test_each_metric_has_the_merge_that_its_meaning_asks_for():
    merges = METRICS | mlx_grpo.LOSSES["grpo"].metrics
    parts = [dict.fromkeys(merges, 0.2), dict.fromkeys(merges, 0.6)]
    sizes = PartSizes(np.array([1, 3]), np.array([2, 2]), all_tokens=8, all_rows=4, by_row=False)
    mean, share = 0.5, 0.25
    assert merge_metrics(parts, merges, sizes) == pytest.approx({
        "kl": mean, "entropy": mean, "entropy_trained": 0.8, "mismatch/mean": mean, "mismatch/kl": mean, "mismatch/max": 0.6,
        "clip_ratio/low_mean": share, "clip_ratio/high_mean": share, "clip_ratio/region_mean": share,
        "clip_ratio/low_min": 0.2, "clip_ratio/high_max": 0.6,
    })  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_logs_what_its_table_says(loss_type):
    metrics = value_and_grads(make_inputs(16), **everything(loss_type))[3]
    assert set(metrics) == {"kl", "entropy", "entropy_trained", *mlx_grpo.LOSSES[loss_type].metrics}


def test_the_least_and_the_most_of_a_rows_clipped_share_by_hand():
    ratios = np.log([[1.5, 0.5, 1.5, 1.0], [1.5, 1.5, 1.0, 1.0], [0.5, 0.5, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0]])
    rows = {"logps": ratios - 3.0, "old_logps": np.full((4, 4), -3.0), "mask": [[1] * 4] * 3 + [[0] * 4]}
    metrics = value_and_grads({**rows, "advantages": [1.0, 1.0, 1.0, -1.0]})[3]
    assert metrics["clip_ratio/low_min"] == 0 and metrics["clip_ratio/high_max"] == 0.5 and metrics["clip_ratio/high_mean"] == pytest.approx(4 / 12)
    metrics = value_and_grads({**rows, "advantages": [-1.0, -1.0, -1.0, -1.0]})[3]
    assert metrics["clip_ratio/low_min"] == 0.0 and metrics["clip_ratio/high_max"] == 0
    rows = {name: np.array(x)[[0, 2, 3]] for name, x in rows.items()}  # the third has no tokens, and no share
    metrics = value_and_grads({**rows, "advantages": [-1.0, -1.0, -1.0]})[3]
    assert metrics["clip_ratio/low_min"] == 0.25 and metrics["clip_ratio/high_max"] == 0


def test_the_mismatch_of_a_sampler_by_hand():
    logps, sampler, mask = mx.array([[-1.0, -2.0, 9.0]]), mx.array([[-1.5, -1.0, 0.0]]), mx.array([[1.0, 1.0, 0.0]])
    found = {name: value.item() for name, value in mlx_grpo.mismatch_metrics(logps, sampler, mask).items()}
    kl = (math.exp(0.5) - 0.5 - 1 + math.exp(-1.0) + 1.0 - 1) / 2
    assert found == pytest.approx({"mismatch/mean": 0.75, "mismatch/kl": kl, "mismatch/max": 1.0})


# Advantages


def advantages_of(rewards, scale="group"):
    return np.array(group_advantages(mx.array(rewards, dtype=mx.float32), scale))


def estimated(estimator, rewards):
    return np.array(estimate_advantages(mx.array(rewards, dtype=mx.float32), estimator))


def test_the_table_of_estimators_is_the_one_tested_here():
    assert tuple(mlx_grpo.ESTIMATORS) == ("group", "rloo", "reinforce_plus_plus_baseline", "maxrl")
    assert tuple(mlx_grpo.LOSSES) == LOSSES


def test_rloo_by_hand():
    nan = np.nan
    assert estimated("rloo", [[3.0, 1.0, 2.0]]) == pytest.approx(np.array([[3 - 1.5, 1 - 2.5, 2 - 2.0]]))
    assert estimated("rloo", [[1.0, 0.0, 0.0, 0.0]]) == pytest.approx(np.array([[1.0, -1 / 3, -1 / 3, -1 / 3]]))
    assert estimated("rloo", [[3.0, nan, 1.0]]) == pytest.approx(np.array([[2.0, 0.0, -2.0]]))


def test_reinforce_plus_plus_by_hand():
    nan = np.nan
    deviation = math.sqrt((0.25 + 0.25 + 1 + 1) / 3)  # of what is left of the groups' means, over the batch
    wanted = np.array([[0.5, -0.5], [1.0, -1.0]]) / (deviation + 1e-4)
    assert estimated("reinforce_plus_plus_baseline", [[1.0, 0.0], [5.0, 3.0]]) == pytest.approx(wanted, rel=1e-5)
    # A flat group counts in the deviation, a lone row does not.
    found = estimated("reinforce_plus_plus_baseline", [[1.0, 0.0, nan], [2.0, 2.0, nan], [7.0, nan, nan]])
    wanted = np.array([[0.5, -0.5, 0], [0] * 3, [0] * 3]) / (math.sqrt(0.5 / 3) + 1e-4)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_maxrl_by_hand():
    nan = np.nan
    assert estimated("maxrl", [[1.0, 0.0, 0.0, 0.0]]) == pytest.approx(np.array([[3.0, -1, -1, -1]]))  # 1 of 4 right
    assert estimated("maxrl", [[1.0, 1.0, 1.0, 0.0]]) == pytest.approx(np.array([[1 / 3, 1 / 3, 1 / 3, -1]]))
    assert estimated("maxrl", [[3.0, 1.0, nan]]) == pytest.approx(np.array([[0.5, -0.5, 0.0]]))
    assert not estimated("maxrl", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).any()
    with pytest.raises(UserError, match="^advantage_estimator maxrl divides by a group's mean reward.*and one is -0.5;"):
        estimated("maxrl", [[1.0, 0.0], [-0.5, 1.0]])


@pytest.mark.parametrize("estimator", mlx_grpo.ESTIMATORS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e-8, 12345.678])
def test_with_any_estimator_equal_rewards_give_exactly_0(estimator, value):
    nan = np.nan
    for size in (2, 3, 7, 11):
        found = estimated(estimator, [[value] * size, [value, *[nan] * (size - 1)], [0.25] * (size - 1) + [0.5], [nan] * size])
        assert not found[[0, 1, 3]].any() and found[2].any()


def test_advantages_by_hand():
    assert advantages_of([[1.0, 0.0]]) == pytest.approx(np.array([[0.5, -0.5]]) / (math.sqrt(0.5) + 1e-4), rel=1e-5)
    assert advantages_of([[3.0, 1.0, 2.0]]) == pytest.approx(np.array([[1.0, -1.0, 0.0]]) / (1 + 1e-4), rel=1e-5)
    assert advantages_of([[3.0, 1.0, 2.0]], "none") == pytest.approx(np.array([[1.0, -1.0, 0.0]]))


def test_the_batch_scale_is_the_deviation_of_the_whole_batch_about_its_mean():
    rewards = [[1.0, 0.0], [5.0, 3.0]]
    deviation = np.std(rewards, ddof=1)
    assert advantages_of(rewards, "batch") == pytest.approx(np.array([[0.5, -0.5], [1.0, -1.0]]) / (deviation + 1e-4), rel=1e-5)


def test_abstentions_stay_out_of_mean_and_deviation():
    nan = np.nan
    assert advantages_of([[3.0, nan, 1.0, nan]]) == pytest.approx(np.array([[1.0, 0, -1.0, 0]]) / (math.sqrt(2) + 1e-4), rel=1e-5)
    found = advantages_of([[3.0, nan, 1.0], [nan, nan, 2.0], [nan, nan, nan]], "batch")
    assert found == pytest.approx(np.array([[1.0, 0, -1.0], [0] * 3, [0] * 3]) / (1 + 1e-4), rel=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_one_scorable_row_or_none_gives_0(scale):
    nan = np.nan
    assert not advantages_of([[nan, 7.3, nan], [nan, nan, nan]], scale).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 0.7, 1e-8, 12345.678, -0.1, 3e7 + 0.1])
def test_equal_rewards_give_exactly_0_though_their_mean_rounds(value, aggregation, scale):
    for size in (2, 3, 5, 6, 7, 8, 11, 16):
        if aggregation == "normalize_then_sum":
            scale = "group"  # the only one it goes with
        config = MLXGRPOConfig(scale_rewards=scale, multi_objective_aggregation=aggregation)
        assert not np.array(combine_rewards(np.full((2, 3, size), value), [1.0, 0.7], config)[1]).any()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_group_without_signal_stays_at_0_beside_others(aggregation):
    rng = np.random.default_rng(0)
    for seed in range(20):
        rewards = rng.random((2, 3, 7))
        rewards[:, 1] = 0.1
        advantages = np.array(combine_rewards(rewards, [1.0, 0.7], MLXGRPOConfig(multi_objective_aggregation=aggregation))[1])
        assert not advantages[1].any()
        assert advantages[0].all() and advantages[2].all()


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_completion_that_no_function_scored_has_advantage_0(aggregation):
    # The mean over the batch is 0 but for rounding: subtracted, it gives abstentions an advantage.
    rng = np.random.default_rng(0)
    for _ in range(20):
        rewards = rng.random((2, 3, 7))
        rewards[:, 0, 2] = rewards[:, 2, 5] = rewards[1, 1, 1] = np.nan
        advantages = np.array(combine_rewards(rewards, [1.0, 0.7], MLXGRPOConfig(multi_objective_aggregation=aggregation))[1])
        assert advantages[0, 2] == advantages[2, 5] == 0 and np.isfinite(advantages).all() and (advantages != 0).sum() == 19


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(
    rewards=st.integers(2, 6).flatmap(lambda g: st.lists(st.lists(st.one_of(st.just(math.nan), st.integers(-4, 4).map(lambda n: n / 4)), min_size=g, max_size=g), min_size=1, max_size=4)),
    scale=st.sampled_from(["group", "batch", "none"]),
)
def test_advantages_keep_the_order_of_rewards_and_sum_to_0(rewards, scale):
    found, rewards = advantages_of(rewards, scale), np.array(rewards)
    assert np.isfinite(found).all() and not found[np.isnan(rewards)].any()
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-4)
    for row, advantages in zip(rewards, found):
        known = ~np.isnan(row)
        if known.sum() > 1:
            assert (np.sign(advantages[known]) == np.sign(np.round(row[known] - row[known].mean(), 9))).all() or scale != "none"
            order = np.argsort(row[known], kind="stable")
            assert (np.diff(advantages[known][order]) >= -1e-6).all()


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(shift=st.integers(-50, 50), order=st.permutations(range(5)))
def test_a_constant_added_to_a_group_and_its_order_do_not_matter(shift, order):
    rewards = np.array([[1.0, 0.5, 0.0, 0.25, 2.0]])
    assert advantages_of(rewards + shift) == pytest.approx(advantages_of(rewards), abs=1e-5)
    assert advantages_of(rewards[:, order]) == pytest.approx(advantages_of(rewards)[:, order], abs=1e-6)


def test_rewards_are_summed_by_weight_and_abstentions_left_out():
    nan = np.nan
    rewards = np.array([[[1.0, nan, nan]], [[10.0, 20.0, nan]]])
    totals, _ = combine_rewards(rewards, [2.0, 0.5], MLXGRPOConfig())
    np.testing.assert_array_equal(totals, [[7.0, 10.0, nan]])


def test_normalize_then_sum_by_hand():
    config = MLXGRPOConfig(multi_objective_aggregation="normalize_then_sum")
    rewards = np.array([[[0.0, 1.0], [1.0, 0.0]], [[0.0, 100.0], [300.0, 0.0]]])
    each = np.array([[-1.0, 1.0], [1.0, -1.0]]) * math.sqrt(0.5)  # either function, its deviation divided out
    summed = 1.0 * each / (1 + 1e-4 / math.sqrt(0.5)) + 0.5 * each
    wanted = summed / (np.std(summed, ddof=1) + 1e-4)
    totals, advantages = combine_rewards(rewards, [1.0, 0.5], config)
    np.testing.assert_allclose(np.array(advantages), wanted, rtol=1e-4)
    np.testing.assert_allclose(totals, [[0.0, 51.0], [151.0, 0.0]])


def test_normalize_then_sum_keeps_a_loud_function_from_drowning_a_quiet_one():
    rewards = np.array([[[0.0, 0.0, 1.0, 1.0]], [[0.0, 100.0, 0.0, 100.0]]])
    summed, each = (
        np.array(combine_rewards(rewards, [1.0, 1.0], MLXGRPOConfig(multi_objective_aggregation=how))[1])[0]
        for how in ("sum_then_normalize", "normalize_then_sum")
    )
    assert each[2] == pytest.approx(each[1], abs=1e-3) and summed[2] < summed[1] - 1
