"""The rollout's log-probs are those of one full forward; padding, company and batching change nothing."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny import ARCHITECTURES, ids_of, LetterTokenizer, logps_of, reasons_of, texts_of, tiny_model

from mlx_grpo.backends import cuda_decoding, cuda_kernels
from mlx_grpo.backends.cuda_decoding import CompiledDecoder, KernelDecoder
from mlx_grpo.rollout import decoding
from mlx_grpo.rollout import kv_cache
import mlx_grpo
from mlx_grpo import Sampling, generate, random_key

# gemma3_text's window is 6: the first is longer.
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34], [40, 41, 42]]


def roll(model, prompts=PROMPTS, g=3, tokens=12, seed=0, **options):
    keys = [random_key(seed, tuple(p)) for p in prompts]
    return generate(model, LetterTokenizer(), prompts, max_new_tokens=tokens, num_generations=g, keys=keys, **options)


def full_logps(model, prompt, completion, temperature=1.0):
    """Log-probs of a completion from one forward of the whole sequence alone, no cache and no padding."""
    logits = model(mx.array([prompt + completion]))[0, len(prompt) - 1 : -1].astype(mx.float32) / temperature
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(mx.take_along_axis(logps, mx.array(completion)[:, None], axis=-1)[:, 0])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_a_full_forward(name, temperature):
    model = tiny_model(name)
    rollout = roll(model, sampling=Sampling(temperature=temperature))
    assert len(ids_of(rollout)) == len(PROMPTS) * 3
    assert len({tuple(c) for c in ids_of(rollout)}) > len(PROMPTS)  # a group's completions differ
    for n, (ids, logps) in enumerate(zip(ids_of(rollout), logps_of(rollout))):
        assert len(ids) == len(logps) > 0
        np.testing.assert_allclose(logps, full_logps(model, PROMPTS[n // 3], ids, temperature), atol=2e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompts_completions_do_not_depend_on_its_company(name):
    model = tiny_model(name)
    together = roll(model)
    for i, prompt in enumerate(PROMPTS):
        alone = roll(model, [prompt])
        assert ids_of(alone) == ids_of(together)[3 * i : 3 * i + 3]
        for a, b in zip(logps_of(alone), logps_of(together)[3 * i :]):
            np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_a_small_kv_budget_decodes_in_several_batches_with_the_same_result(name):
    model = tiny_model(name)
    assert ids_of(roll(model, kv_budget=1)) == ids_of(roll(model))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_can_be_padded_does_not_depend_on_the_precision(name, dtype, monkeypatch):
    monkeypatch.setattr(kv_cache, "TRIED", {})
    model = tiny_model(name)
    model.set_dtype(dtype)
    assert kv_cache.can_pad(model) == (name != "gemma2")  # whose attention has a mask of another shape
    assert all(p.dtype in (dtype, mx.float32) for _, p in tree_flatten(model.parameters()))


def test_the_trial_of_padding_is_in_float32_and_leaves_the_weights(monkeypatch):
    monkeypatch.setattr(kv_cache, "TRIED", {})
    model, seen = tiny_model("qwen2"), []
    model.set_dtype(mx.bfloat16)
    before, call = model.model.embed_tokens.weight, type(model).__call__

    def noting(self, *args, **kwargs):
        seen.append(self.model.embed_tokens.weight.dtype)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "__call__", noting)
    assert kv_cache.can_pad(model) and model.model.embed_tokens.weight is before
    assert set(seen) == {mx.float32}


def masks(change):
    """mlx-lm's function that asks a cache for its mask, with `change` applied to one that is an array."""
    from mlx_lm.models.base import create_attention_mask

    def changed(*args, **kwargs):
        mask = create_attention_mask(*args, **kwargs)
        return change(mask) if isinstance(mask, mx.array) else mask

    return changed


@pytest.mark.parametrize("make_mask,reason", [
    (lambda h, cache, **kwargs: "causal" if h.shape[1] > 1 else None, "asks for no mask"),
    (masks(lambda mask: mask | True), "padding changes"),
    (masks(lambda mask: mask[..., None]), "takes no mask"),
])  # fmt: skip
def test_a_model_whose_code_takes_no_mask_is_not_padded_and_says_why(make_mask, reason, monkeypatch):
    import mlx_lm.models.qwen2

    monkeypatch.setattr(kv_cache, "TRIED", {})
    monkeypatch.setattr(mlx_lm.models.qwen2, "create_attention_mask", make_mask)
    model = tiny_model("qwen2")
    assert reason in kv_cache.reason_not_to_pad(model) and not kv_cache.can_pad(model)


def test_a_cache_without_a_batched_form_is_not_padded_and_says_which(monkeypatch):
    from mlx_lm.models.cache import ChunkedKVCache

    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "make_cache", lambda self: [ChunkedKVCache(8) for _ in self.layers])
    assert kv_cache.reason_not_to_pad(model) == "mlx-lm has no batched form of this model's ChunkedKVCache"


def test_no_more_rows_than_asked_for_are_decoded_at_a_time(monkeypatch):
    model, seen, real = tiny_model("qwen2"), [], mlx_grpo.decode
    monkeypatch.setattr(mlx_grpo.script, "decode", lambda *given: (seen.append(len(given[3])), real(*given))[1])
    limited = ids_of(roll(model, most_rows=7))
    assert seen == [6, 6] and limited == ids_of(roll(model))


def test_the_sampled_distribution_is_the_models():
    logits = mx.array([[0.0, 1.0, 2.0, -1e30, 1.5]])
    n = 40_000
    uniforms = (mx.arange(n) + 0.5) / n
    ids, logps = mlx_grpo.sample(mx.repeat(logits, n, axis=0), uniforms, Sampling(), None)
    expected = np.array(mx.softmax(logits, axis=-1))[0]
    np.testing.assert_allclose(np.bincount(np.array(ids), minlength=5) / n, expected, atol=1e-3)
    np.testing.assert_allclose(np.exp(np.array(logps)), expected[np.array(ids)], rtol=1e-5)


def test_filters_sample_within_their_set_and_report_the_filtered_log_probs():
    logits = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))
    uniforms = mx.array([0.0, 0.3, 0.6, 0.9999999])
    for sampling, kept in [(Sampling(top_k=2), 2), (Sampling(top_p=0.7), 2), (Sampling(min_p=0.2), 3)]:
        ids, logps = mlx_grpo.sample(mx.repeat(logits, 4, axis=0), uniforms, sampling, None)
        assert max(ids.tolist()) == kept - 1
        total = sum([0.5, 0.3, 0.15][:kept])
        np.testing.assert_allclose(np.exp(np.array(logps)), np.array([0.5, 0.3, 0.15])[np.array(ids)] / total, rtol=1e-4)


def test_uniforms_at_the_edges_never_draw_an_impossible_id():
    logits = mx.array([[-mx.inf, 0.0, -mx.inf]] * 2)
    ids, _ = mlx_grpo.sample(logits, mx.array([0.0, 1.0 - 2**-24]), Sampling(), None)
    assert ids.tolist() == [1, 1]


def test_the_ending_id_is_kept_and_rows_end_where_they_should():
    model = tiny_model("qwen2")
    rollout = roll(model, g=8, tokens=40)
    reasons = set(reasons_of(rollout))
    assert reasons == {"eos", "length"}
    for ids, reason in zip(ids_of(rollout), reasons_of(rollout)):
        assert (ids[-1] == 96) == (reason == "eos")
        assert 96 not in ids[:-1]
        assert len(ids) == 40 if reason == "length" else len(ids) <= 40


def test_a_stop_string_ends_a_row_at_the_id_that_completes_it():
    model = tiny_model("qwen2")
    free = roll(model, g=4, tokens=40)
    target = texts_of(free)[0][7:10]  # spans the boundary between two decoding blocks
    stopped = roll(model, g=4, tokens=40, stop_strings=[target])
    assert reasons_of(stopped)[0] == "stop"
    for ids, text, reason in zip(ids_of(stopped), texts_of(stopped), reasons_of(stopped)):
        assert text.endswith(target) and text.count(target) == 1 if reason == "stop" else target not in text
    assert ids_of(stopped)[0] == ids_of(free)[0][:10]
    assert len(logps_of(stopped)[0]) == 10


def test_greedy_is_the_argmax_of_a_full_forward():
    model = tiny_model("llama")
    rollout = generate(model, LetterTokenizer(), PROMPTS, max_new_tokens=6, sampling=Sampling(temperature=0.0))
    for prompt, completion in zip(PROMPTS, ids_of(rollout)):
        ids = list(prompt)
        for token in completion:
            assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
            ids.append(token)


def test_a_repetition_penalty_changes_what_is_sampled_and_is_in_the_log_probs():
    model = tiny_model("qwen2")
    plain, penalised = roll(model), roll(model, sampling=Sampling(repetition_penalty=1.5))
    assert ids_of(plain) != ids_of(penalised)
    prompt, ids = PROMPTS[0], ids_of(penalised)[0]
    logits = np.array(model(mx.array([prompt]))[0, -1])
    seen = sorted(set(prompt))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
    expected = logits[ids[0]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert logps_of(penalised)[0][0] == pytest.approx(expected, abs=1e-4)


def test_long_prompts_prefill_in_chunks(monkeypatch):
    model = tiny_model("qwen2")
    whole = roll(model)
    monkeypatch.setattr(kv_cache, "PREFILL_CHUNK", 2)
    assert ids_of(roll(model)) == ids_of(whole)


def test_a_prompt_of_one_id_works():
    rollout = roll(tiny_model("qwen2"), [[7], [8, 9, 10]])
    for n, ids in enumerate(ids_of(rollout)):
        np.testing.assert_allclose(logps_of(rollout)[n], full_logps(tiny_model("qwen2"), [[7], [8, 9, 10]][n // 3], ids), atol=2e-4)


def test_a_cache_whose_state_cannot_be_set_gives_the_same_completions():
    from mlx_lm.models.cache import KVCache

    class Sealed(KVCache):
        state = property(lambda self: (self.keys, self.values))

    model = tiny_model("qwen2")
    expected = roll(model)
    type(model).make_cache = lambda self: [Sealed() for _ in self.layers]
    try:
        assert ids_of(roll(model)) == ids_of(expected)
    finally:
        del type(model).make_cache


@pytest.mark.parametrize("kind", [CompiledDecoder, KernelDecoder])
@pytest.mark.parametrize("options", [{}, {"sampling": Sampling(repetition_penalty=1.3)}, {"stop_strings": ["*"]}])
def test_every_decoder_draws_the_same(kind, options):
    model = tiny_model("qwen2")
    expected = roll(model, prompts=[*PROMPTS, [7]], g=4, tokens=90, **options)
    again = roll(model, prompts=[*PROMPTS, [7]], g=4, tokens=90, decoder=kind(model), **options)
    assert ids_of(again) == ids_of(expected) and reasons_of(again) == reasons_of(expected)
    for a, b in zip(logps_of(again), logps_of(expected)):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_kept_decoder_sees_the_weights_as_they_are():
    model = tiny_model("qwen2")
    decoder = CompiledDecoder(model)
    before = roll(model, decoder=decoder)
    model.update(tree_map(lambda w: 1.5 * w, model.parameters()))
    after = roll(model, decoder=decoder)
    assert ids_of(before) != ids_of(after)
    assert ids_of(after) == ids_of(roll(model))


def test_rollouts_and_evaluations_share_what_is_compiled_and_the_least_recently_used_goes(monkeypatch):
    model, traced, compute = tiny_model("qwen2"), [], cuda_decoding.compute_position

    def noting(model, launches, last, *rest):
        traced.append(len(last))
        return compute(model, launches, last, *rest)

    monkeypatch.setattr(cuda_decoding, "compute_position", noting)
    monkeypatch.setattr(cuda_decoding, "MOST_SHAPES", 2)
    decoder = CompiledDecoder(model)
    greedy = {"sampling": Sampling(temperature=0.0), "g": 1}
    for options, prompts in (({}, 1), (greedy, 3), (greedy, 2), ({}, 1), (greedy, 4), (greedy, 2)):
        rollout = roll(model, PROMPTS[:prompts], decoder=decoder, **options)
        assert ids_of(rollout) == ids_of(roll(model, PROMPTS[:prompts], **options))
    assert traced == [3, 2, 4, 2]  # rows. Three come twice, drawn otherwise; two were dropped
    assert list(decoder.compiled) == [(4, 64), (2, 64)]


def test_rows_leave_when_an_eighth_has_ended_or_by_halves_where_shapes_are_compiled():
    plain, compiled = decoding.Decoder(None), CompiledDecoder(tiny_model("qwen2"))
    assert [plain.rows_to_keep(going, 64) for going in (64, 57, 56, 1)] == [64, 64, 56, 1]
    assert [compiled.rows_to_keep(going, 64) for going in (64, 33, 32, 17, 16, 1)] == [64, 64, 32, 32, 16, 16]
    assert compiled.rows_to_keep(1, 24) == 24  # a half of it is less than the GPU can be filled with


def test_a_cache_is_as_large_as_its_windows_and_states():
    # 2 layers x 10 positions x 128 bytes: 2 heads of 8 numbers, keys and values, in float32
    assert kv_cache.cache_bytes(tiny_model("qwen2"), 10) == 2 * 10 * 128
    assert kv_cache.cache_bytes(tiny_model("gemma3_text"), 10) == (6 + 10) * 128  # a window of 6
    state = 4 * (3 * 64 + 4 * 8 * 8)  # the convolution's inputs and the gated delta state
    assert kv_cache.cache_bytes(tiny_model("qwen3_5"), 10) == state + 10 * 128
    assert kv_cache.kv_bytes_per_token(tiny_model("qwen3_5")) == 128


def test_a_run_builds_its_fast_decoder_after_so_many_positions_and_a_resumed_one_at_once():
    config = mlx_grpo.MLXGRPOConfig(max_completion_length=100, num_iterations=2)
    old_policy = mlx_grpo.OldPolicy(tiny_model("qwen2"), config)
    built = [update for update in range(0, 40, 2) if old_policy.decoder_at(update) is old_policy.decoder]
    assert built == [30, 32, 34, 36, 38]  # 15 rollouts of at most 100 positions


def test_elsewhere_than_on_cuda_decoding_is_plain_mlx():
    if not cuda_kernels.has_tensor_cores():
        assert type(cuda_decoding.fast_decoder(tiny_model("qwen2"))) is decoding.Decoder


def test_generate_prints_nothing(capsys):
    roll(tiny_model("qwen2"))
    assert capsys.readouterr().out == ""  # standard output may be JSON
