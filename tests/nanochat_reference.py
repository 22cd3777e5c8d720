"""nanochat's two architectures written down again in plain torch, float32 and no cache, to hold the MLX models against.

Independent of convert_nanochat.py and nanochat_2026.py on purpose: shapes, windows and constants are stated here anew.
"""

import json
import pickle

import torch
import torch.nn.functional as F
from nanochat_tokenizer import make_encoding


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)


def rotate(x, base):
    """x: (T, H, D): the first half of D against the second, by minus the angle."""
    T, _, D = x.shape
    angle = torch.arange(T)[:, None] * base ** (-torch.arange(0, D, 2) / D)  # (T, D/2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def attention(q, k, v, window):
    """q: (T, H, D), k, v: (T, KV, D); position i sees j where i - window <= j <= i."""
    T, H, D = q.shape
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    scores = torch.einsum("ihd,jhd->hij", q, k) / D**0.5
    scores = scores.masked_fill((j > i) | (i - j > window), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(T, H * D)


def logits(weights, config, ids):
    """One row of ids (T,) -> logits (T, V) of the checkpoint's model, of either architecture."""
    w = {key.removeprefix("_orig_mod."): value.float() for key, value in weights.items()}
    new = "window_pattern" in config
    T, layers, heads, kv_heads = len(ids), config["n_layer"], config["n_head"], config["n_kv_head"]
    ids = torch.tensor(ids)
    x = rms(w["transformer.wte.weight"][ids])
    if new:
        gates = [w["smear_lambda"][0] * torch.sigmoid(w["smear_gate.weight"][0] @ x[t, :24]) for t in range(T)]
        x = torch.stack([x[0], *(x[t] + gates[t] * x[t - 1] for t in range(1, T))])
    x0 = x
    for i in range(layers):
        block = f"transformer.h.{i}."
        if new:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = rms(x)
        q = (h @ w[block + "attn.c_q.weight"].T).view(T, heads, -1)
        k, v = ((h @ w[block + f"attn.{name}.weight"].T).view(T, kv_heads, -1) for name in ("c_k", "c_v"))
        if new and i % 2 == (layers - 1) % 2:
            gate = 3 * torch.sigmoid(h[:, :12] @ w[block + "attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].view(v.shape)
        base, sharp = (100000.0, 1.2) if new else (10000.0, 1.0)
        q, k = sharp * rms(rotate(q, base)), sharp * rms(rotate(k, base))
        short = -(-config["sequence_len"] // 4 // 128) * 128
        long = not new or i == layers - 1 or config["window_pattern"][i % len(config["window_pattern"])] == "L"
        x = (
            x
            + attention(q, k, v, (config["sequence_len"] if new else T) if long else short)
            @ w[block + "attn.c_proj.weight"].T
        )
        h = rms(x) @ w[block + "mlp.c_fc.weight"].T
        x = x + F.relu(h) ** 2 @ w[block + "mlp.c_proj.weight"].T
        if new and i == layers // 2:
            middle = x
    if new:
        x = x - w["backout_lambda"][0] * middle
    out = (rms(x) @ w["lm_head.weight"].T)[:, : config["vocab_size"]]
    return 15 * torch.tanh(out / 15)


def random_checkpoint(folder, *, new=False, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, sequence_len=64, step=123,
                      prefix="_orig_mod.", window_pattern="SSL", encoding=None):  # fmt: skip
    """Write a checkpoint as nanochat does, mixed dtypes and all; returns (weights, model_config, encoding)."""
    generator = torch.Generator().manual_seed(7)
    encoding = encoding or make_encoding()
    V, D, KV = encoding.n_vocab, n_embd, n_embd // n_head * n_kv_head
    rows = -(-V // 64) * 64 if new else V

    def normal(*shape, scale=None):
        return torch.randn(*shape, generator=generator) * (scale or shape[-1] ** -0.5)

    w = {"transformer.wte.weight": normal(rows, D, scale=1.0).bfloat16()}
    for i in range(n_layer):
        for name, shape in (("attn.c_q", (D, D)), ("attn.c_k", (KV, D)), ("attn.c_v", (KV, D)), ("attn.c_proj", (D, D)),
                            ("mlp.c_fc", (4 * D, D)), ("mlp.c_proj", (D, 4 * D))):  # fmt: skip
            w[f"transformer.h.{i}.{name}.weight"] = normal(*shape)
        if new and i % 2 == (n_layer - 1) % 2:
            w[f"transformer.h.{i}.attn.ve_gate.weight"] = normal(n_kv_head, 12)
    w["lm_head.weight"] = normal(rows, D)
    if new:
        w |= {"resid_lambdas": 1 + normal(n_layer, scale=0.2), "x0_lambdas": normal(n_layer, scale=0.3)}
        w |= {
            "smear_gate.weight": normal(1, 24),
            "smear_lambda": torch.tensor([0.7]),
            "backout_lambda": torch.tensor([0.3]),
        }
        w |= {
            f"value_embeds.{i}.weight": normal(rows, KV, scale=0.5).bfloat16()
            for i in range(n_layer)
            if i % 2 == (n_layer - 1) % 2
        }
    w = {prefix + key: value for key, value in w.items()}
    config = {
        "sequence_len": sequence_len,
        "vocab_size": V,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": D,
    }
    config |= {"window_pattern": window_pattern} if new else {}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(w, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return w, config, encoding
