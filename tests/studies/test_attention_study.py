"""The study of attention in the trained example against brute force and the project's reference."""

from __future__ import annotations

import math

import attention_study as s
import pytest
import torch
import torch.nn.functional as F
import transformer
from transformer import VideoTransformer

from sparge_compile.kernels.reference import attention, block_map


def model_sites(frames, layers=1, batch=2):
    torch.manual_seed(0)
    model = VideoTransformer(width=64, layers=layers, heads=2)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    for b in model.blocks:  # attention that is peaked
        b.attention.norm_query.weight.data.mul_(2.5)
        b.attention.norm_key.weight.data.mul_(2.5)
    video = torch.randn(batch, frames, 64, 64)
    before = (F.scaled_dot_product_attention, transformer.rotate)
    sites = s.record(model.eval(), video, torch.rand(batch), torch.zeros(batch, 10))
    assert before == (F.scaled_dot_product_attention, transformer.rotate)
    return model, sites


def test_record():
    model, sites = model_sites(2, 3)
    assert [x.name for x in sites] == [f"blocks.{i}.attention" for i in range(3)]
    x = sites[0]
    assert x.q.shape == (2, 2, 512, 32) and x.grid == (2, 16, 16)
    places = transformer.rope(2, 16, 16, 32, "cpu")
    for site in sites:
        torch.testing.assert_close(transformer.rotate(site.q_flat, places), site.q)
        torch.testing.assert_close(transformer.rotate(site.k_flat, places), site.k)
    before = (F.scaled_dot_product_attention, transformer.rotate)
    with pytest.raises(RuntimeError):
        s.record(model, torch.zeros(2, 2, 64, 64), torch.zeros(3, 1, 1), torch.zeros(2, 7))
    assert before == (F.scaled_dot_product_attention, transformer.rotate)
    m = model.bfloat16()
    assert s.record(m, torch.zeros(1, 2, 64, 64), torch.zeros(1), torch.zeros(1, 10))[0].q_flat.dtype == torch.float32


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_split(density):
    _, (site,) = model_sites(4)
    got = s.error_split(site, density)
    # brute force in float64 with the project's own reference
    q, k, v = (x.double() for x in (site.q, site.k, site.v))
    bm = block_map(site.q, site.k, torch.tensor([[density, 0.0]] * 2))
    kept = bm.to_dense().repeat_interleave(128, 2).repeat_interleave(64, 3)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    o = weights @ v
    m = (weights * kept).sum(-1, keepdim=True)
    first, second = -(weights * ~kept) @ v, (1 / m - 1) * ((weights * kept) @ v)
    o_s = attention(q, k, v, bm)[0]
    torch.testing.assert_close(first + second, o_s - o)
    n = o.abs().sum((0, 2, 3))
    want = {
        "error": (o_s - o).abs().sum((0, 2, 3)) / n,
        "dropped": first.abs().sum((0, 2, 3)) / n,
        "renormalised": second.abs().sum((0, 2, 3)) / n,
        "lost_mass": (1 - m).mean((0, 2, 3)),
        "cosine": F.cosine_similarity(first.flatten(2), second.flatten(2), -1).mean(0),
    }
    assert got.keys() == want.keys()
    for name in got:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=1e-5)
    rows = s.ranking_gaps(site, [density], ["pooled"])
    for h, r in enumerate(rows):
        assert abs(r["error"] - got["error"][h]) < 1e-5 and abs(r["mass"] + got["lost_mass"][h] - 1) < 1e-5


def test_full_density():
    _, (site,) = model_sites(4)
    got = s.error_split(site, 1.0)
    assert all(got[n].abs().max() < 1e-5 for n in got)
    for r in s.ranking_gaps(site, [1.0]):
        assert abs(r["mass"] - 1) < 1e-5 and r["error"] < 1e-5, r


def test_gaps():
    _, (site,) = model_sites(4)
    rows = s.ranking_gaps(site, [0.1, 0.25, 0.5])
    assert len(rows) == 2 * 3 * len(s.WAYS)
    by = {(r["head"], r["density"], r["way"]): r for r in rows}
    for (h, d, w), r in by.items():
        best = "tiles oracle" if w.startswith("tiles") else "oracle"
        assert by[h, d, best]["mass"] >= r["mass"] - 1e-6
    # the tiled rows against the reference on permuted tensors
    order = s.tile_order(4, 16, 16)
    q, k, v = (x[:, :, order] for x in (site.q, site.k, site.v))
    o = F.scaled_dot_product_attention(q, k, v)
    o_s = attention(q, k, v, block_map(q, k, torch.tensor([[0.25, 0.0]] * 2)))[0]
    want = (o_s - o).abs().sum((0, 2, 3)) / o.abs().sum((0, 2, 3))
    for h in range(2):
        assert abs(by[h, 0.25, "tiles 2x4x8"]["error"] - want[h]) < 1e-4
    assert s.ranking_gaps(site, [0.1]) == [r for r in rows if r["density"] == 0.1]


def test_representatives():
    _, (site,) = model_sites(4)
    head = s.one_head(site, 0, 0)
    p, r = s.pooled(head, 1), s.key_representatives(head, 1)
    true = (head.scale * s.pool(head.q, 128) @ head.k.T).unflatten(1, (-1, 64)).logsumexp(-1)
    assert (r >= p + math.log(64) - 1e-4).all() and (r <= true + 1e-4).all()
    q, k = head.q.double(), head.k.double() - head.k.double().mean(0)
    qb, kb = q.unflatten(0, (-1, 128)), k.unflatten(0, (-1, 64))

    def cov(x):
        return (x - x.mean(1, keepdim=True)).mT @ (x - x.mean(1, keepdim=True)) / x.shape[1]

    qm, km, sc = qb.mean(1), kb.mean(1), head.scale
    want = sc * qm @ km.T + 0.5 * sc**2 * (
        torch.einsum("id,jde,ie->ij", qm, cov(kb), qm) + torch.einsum("jd,ide,je->ij", km, cov(qb), km)
    )
    torch.testing.assert_close(s.variance(head, 1).double(), want, rtol=1e-4, atol=1e-4)
    qs, ks = qb.unflatten(1, (4, 32)).mean(2), head.k.double().unflatten(0, (-1, 4, 16)).mean(2)
    want = (sc * torch.einsum("iad,jbd->ijab", qs, ks)).logsumexp((2, 3))
    torch.testing.assert_close(s.sub_blocks(head, 1).double(), want, rtol=1e-4, atol=1e-4)


def test_tiles():
    order = s.tile_order(24, 16, 16)
    assert order.dtype == torch.int64 and (order.sort().values == torch.arange(6144)).all()
    t, h, w = order // 256, order // 16 % 16, order % 16
    for n, spans in ((64, (2, 4, 8)), (128, (4, 4, 8))):
        for x, span in zip((t, h, w), spans, strict=True):
            b = x.view(-1, n)
            assert (b.amax(1) - b.amin(1) + 1 == span).all() and (b.amin(1) % span == 0).all()


def test_refuses():
    q, k, v = s.synthetic("uniform", 200)
    with pytest.raises(ValueError):
        s.error_split(s.Site("x", q, k, v, q, k), 0.5)
    q, k, v = s.synthetic("uniform", 1024)
    with pytest.raises(ValueError):
        s.ranking_gaps(s.Site("x", q, k, v, q, k), [0.5])
    with pytest.raises(ValueError):
        s.synthetic("other")


def test_tiny_mass():
    q, k, v = s.synthetic("clustered", 512)
    site = s.Site("x", 10 * q, 10 * k, v, q, k, (2, 16, 16))
    for r in s.ranking_gaps(site, [0.1], [w for w in s.WAYS if "tiles" not in w]):
        assert r["error"] == r["error"] and r["error"] < 100
    assert all(x.isfinite().all() for x in s.error_split(site, 0.1).values())
