"""Tree energy loss: spanning trees against Kruskal, the filter against a dense float64 form,
gradients, the official fixture."""

import numpy as np
import pytest
import torch

from shared import need
from segkern.losses.tree import (
    Tree,
    edge_similarity,
    filtered,
    grid_distances,
    grid_edges,
    minimum_spanning_tree,
    tree_energy_loss,
    tree_filter,
    tree_inputs,
)
from segkern.testing import assert_close, make_input

SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 7), (13, 11)]


def kruskal(feature):
    "The only minimum spanning tree under (weight, edge index), one picture, in the order of the edges."
    h, w = feature.shape[-2:]
    edges = grid_edges(h, w)
    weight = grid_distances(feature[None].float())[0] + 1
    group = list(range(h * w))
    chosen = []

    def find(i):
        while group[i] != i:
            i = group[i]
        return i

    for e in sorted(range(len(edges)), key=lambda e: (weight[e].item(), e)):
        a, b = (find(i) for i in edges[e].tolist())
        if a != b:
            group[a] = b
            chosen.append(e)
    return edges[sorted(chosen)]


def dense(x, edges, similarity):
    "The filter of one picture from the full matrix of path products; x [c, v]."
    v = x.shape[1]
    near = [[] for _ in range(v)]
    for e, (a, b) in enumerate(edges.tolist()):
        near[a].append((b, e))
        near[b].append((a, e))
    rows = []
    for i in range(v):
        row = {i: similarity.new_ones(())}
        todo = [i]
        while todo:
            j = todo.pop()
            for k, e in near[j]:
                if k not in row:
                    row[k] = row[j] * similarity[e]
                    todo.append(k)
        rows.append(torch.stack([row[k] for k in range(v)]))
    s = torch.stack(rows)
    return (x @ s.T) / s.sum(1)


def photo(b, h, w, seed=0, levels=6, d=3):
    "A picture with few different values, so that equal edges are the rule."
    return torch.from_numpy(
        np.random.RandomState(seed).randint(0, levels, (b, d, h, w)) / levels
    ).float()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_tree_is_kruskals(size, levels):
    x = photo(3, *size, levels=levels)
    edges = minimum_spanning_tree(x)
    assert edges.shape == (3, size[0] * size[1] - 1, 2)
    for got, one in zip(edges, x):
        assert torch.equal(got, kruskal(one))


def test_tree_of_a_photograph_weighs_what_scipys_does():
    csgraph = pytest.importorskip("scipy.sparse.csgraph")
    from scipy.sparse import coo_matrix

    x = torch.nn.functional.avg_pool2d(torch.rand(2, 3, 66, 84), 3, 1)
    for one, edges in zip(x, minimum_spanning_tree(x)):
        weight = grid_distances(one[None])[0] + 1
        all_edges = grid_edges(64, 82)
        best = csgraph.minimum_spanning_tree(
            coo_matrix((weight.double(), all_edges.T.numpy()), shape=(64 * 82,) * 2)
        ).sum()
        index = {tuple(e): k for k, e in enumerate(all_edges.tolist())}
        assert (
            abs(weight[[index[tuple(e)] for e in edges.tolist()]].double().sum() - best)
            < 1e-6 * best
        )


def test_each_picture_has_its_own_tree():
    "A picture's tree does not depend on its neighbours in the batch."
    x = photo(4, 9, 6)
    assert torch.equal(
        minimum_spanning_tree(x), torch.cat([minimum_spanning_tree(i[None]) for i in x])
    )


def test_bad_values_still_make_trees():
    x = photo(1, 6, 6)
    x[0, 0, 2, 3], x[0, 1, 4, 4] = float("nan"), float("inf")
    Tree(minimum_spanning_tree(x))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rooted_tree(size):
    v = size[0] * size[1]
    tree = Tree(minimum_spanning_tree(photo(2, *size)))
    for k in range(2):
        parent = tree.parent[k].tolist()
        depth = tree.depth[k].tolist()
        order = tree.order[k].tolist()
        assert (
            parent[0] == -1 and depth[0] == 0 and order[0] == 0 and sorted(order) == list(range(v))
        )
        assert {tuple(sorted((i, parent[i]))) for i in range(1, v)} == {
            tuple(e) for e in tree.edges[k].tolist()
        }
        assert all(depth[i] == depth[parent[i]] + 1 for i in range(1, v))
        assert [depth[i] for i in order] == sorted(depth)


@pytest.mark.parametrize("shape", ["path", "star", "caterpillar", "random"])
def test_any_tree(shape):
    "Trees that no grid has: the order of elimination does not rely on degrees up to four."
    v = 40
    rng = np.random.RandomState(3)
    up = dict(
        path=lambda i: i - 1,
        star=lambda i: 0,
        caterpillar=lambda i: i - 1 if i % 2 else max(i - 2, 0),
        random=lambda i: rng.randint(0, i),
    )[shape]
    names = rng.permutation(v)
    edges = torch.tensor([[names[i], names[up(i)]] for i in range(1, v)])[None]
    x = make_input([1, 3, v], 5).double()
    w = torch.rand(1, v - 1, dtype=torch.float64)
    assert_close(shape, dense(x[0], edges[0], w[0]), tree_filter(x, Tree(edges), w)[0], 1e-12)


@pytest.mark.parametrize(
    "edges, message",
    [
        ([[0, 1], [0, 1], [0, 2]], "do not join all 4"),
        ([[1, 2], [2, 3], [3, 1]], "do not join all 4"),
        ([[0, 1], [1, 2], [2, 4]], "vertices 0..3, got 0..4"),
        ([[0, 0], [1, 2], [2, 3]], "do not join"),
    ],
)
def test_no_tree(edges, message):
    with pytest.raises(ValueError, match=message):
        Tree(torch.tensor([edges]))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_filter_is_the_dense_one(size):
    "Values and both gradients in float64, zeros and ones among the similarities included."
    torch.manual_seed(1)
    v = size[0] * size[1]
    tree = Tree(minimum_spanning_tree(photo(2, *size)))
    x = torch.randn(2, 3, v, dtype=torch.float64, requires_grad=True)
    w = torch.rand(2, v - 1, dtype=torch.float64)
    w[:, ::5], w[:, 1::5] = 1, 0
    w.requires_grad_()
    seed = torch.randn(2, 3, v, dtype=torch.float64)
    got = tree_filter(x, tree, w)
    ref = torch.stack([dense(*part) for part in zip(x, tree.edges, w)])
    assert_close("values", ref, got, 1e-12)
    wanted = torch.autograd.grad((ref * seed).sum(), (x, w), allow_unused=True)
    for name, a, b in zip(
        ("x", "similarity"), wanted, torch.autograd.grad((got * seed).sum(), (x, w))
    ):
        if a is not None and a.numel():
            assert_close(name, a, b, 1e-11)


def test_gradcheck():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    feature = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 4, 5) < 0.6
    tree = Tree(minimum_spanning_tree(feature))
    assert torch.autograd.gradcheck(
        lambda x, f: tree_filter(x, tree, edge_similarity(f, tree)), (logits, feature)
    )
    assert torch.autograd.gradcheck(
        lambda x, f: tree_energy_loss(x, image, mask, f), (logits, feature)
    )


@pytest.mark.parametrize("name", ["loss", "AS_low", "AS", "grad_preds", "grad_high", "trees"])
def test_fixture(name):
    f = need("sasformer_sparse_tree")
    x = f.inputs()
    logits = (3 * x["preds"]).requires_grad_()
    low = torch.sigmoid(x["low"])
    high = (0.5 * x["high"]).requires_grad_()
    mask = x["mask"] > -0.5
    prob, small, _ = tree_inputs(logits, low, mask)
    if name == "trees":
        for key, t in (("mst_low", small), ("mst_high", high)):
            assert (
                sorted(minimum_spanning_tree(t)[0].tolist()) == f.golden[key].astype(int).tolist()
            ), key
        return
    loss = tree_energy_loss(logits, low, mask, high, f.spec["weight"], f.spec["sigma"])
    if name == "loss":
        got = torch.stack(
            [loss, tree_energy_loss(logits, low, mask, None, f.spec["weight"], f.spec["sigma"])]
        )
    elif name.startswith("AS"):
        got = (
            filtered(prob, small, f.spec["sigma"])
            if name == "AS_low"
            else filtered(filtered(prob, small, f.spec["sigma"]), high)
        )
    else:
        got = (
            torch.autograd.grad(loss, logits if name == "grad_preds" else high)[0]
            * f.spec["grad_scale"]
        )
    assert f.error(name, got) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits(dtype):
    "Half-precision logits and features are filtered in float32."
    z = make_input([2, 4, 8, 8])
    image = torch.rand(2, 3, 16, 16)
    mask = torch.rand(2, 16, 16) < 0.5
    e = make_input([2, 6, 8, 8], 2)
    low = [t.to(dtype).requires_grad_() for t in (z, e)]
    loss = tree_energy_loss(low[0], image, mask, low[1])
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(
        "loss",
        tree_energy_loss(low[0].detach().float(), image, mask, low[1].detach().float()),
        loss,
        1e-6,
    )
    assert all(
        t.grad.dtype == dtype and torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0
        for t in low
    )


def test_autocast():
    z = make_input([1, 4, 8, 8]).requires_grad_()
    image = torch.rand(1, 3, 8, 8)
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        loss = tree_energy_loss(z, image, mask, make_input([1, 6, 8, 8], 2))
    assert_close("loss", tree_energy_loss(z, image, mask, make_input([1, 6, 8, 8], 2)), loss, 1e-6)


@pytest.mark.parametrize("labelled", ["all", "none", "one picture"])
def test_nothing_or_everything_unlabelled(labelled):
    z = make_input([2, 4, 8, 8]).requires_grad_()
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    if labelled == "none":
        mask[:] = True
    if labelled == "one picture":
        mask[0] = True
    loss = tree_energy_loss(z, torch.rand(2, 3, 16, 16), mask)
    loss.backward()
    assert torch.isfinite(z.grad).all() and (loss.item() == 0) == (labelled == "all")
    if labelled == "one picture":
        assert z.grad[0].abs().sum() > 0 and z.grad[1].abs().sum() == 0


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (25, 35)], ids=str)
def test_odd_sizes_and_one_pixel(size):
    z = make_input([2, 3, *size]).requires_grad_()
    loss = tree_energy_loss(z, torch.rand(2, 3, 100, 140), torch.rand(2, 100, 140) < 0.9)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_empty_batch():
    assert (
        tree_energy_loss(
            torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool)
        )
        == 0
    )


def test_constants_stay_and_channels_are_independent():
    image = photo(1, 9, 7)
    x = make_input([1, 3, 9, 7])
    assert_close(
        "constant", torch.ones(1, 2, 9, 7), filtered(torch.ones(1, 2, 9, 7), image, 0.1), 1e-6
    )
    assert_close(
        "channels",
        torch.cat([filtered(x[:, k : k + 1], image, 0.1) for k in range(3)], 1),
        filtered(x, image, 0.1),
        1e-6,
    )
    assert_close(
        "scale and shift", 3 * filtered(x, image, 0.1) + 2, filtered(3 * x + 2, image, 0.1), 1e-6
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(unlabelled=torch.ones(2, 4, 4)), "unlabelled must be"),
        (dict(image=torch.rand(1, 3, 8, 8)), "pictures"),
        (dict(feature=torch.rand(2, 3, 8, 8)), "embedding must be"),
    ],
)
def test_shape_errors(change, message):
    good = dict(
        logits=torch.randn(2, 3, 4, 4),
        image=torch.rand(2, 3, 8, 8),
        unlabelled=torch.ones(2, 8, 8, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match=message):
        tree_energy_loss(**{**good, **change})


def test_rounds_grow_with_the_logarithm():
    "No Python step per vertex or per level: eightfold sides add few rounds."
    rounds = {
        side: len(Tree(minimum_spanning_tree(torch.rand(1, 3, side, side)))._rounds)
        for side in (16, 128)
    }
    assert rounds[128] <= rounds[16] + 24


@pytest.mark.gpu
def test_on_a_gpu():
    "The same trees, values and gradients as on the CPU."
    parts = (
        make_input([2, 4, 24, 20]),
        torch.rand(2, 3, 48, 40),
        torch.rand(2, 48, 40) < 0.8,
        make_input([2, 6, 24, 20], 2),
    )
    assert torch.equal(
        minimum_spanning_tree(parts[1].cuda()).cpu(), minimum_spanning_tree(parts[1])
    )
    losses = {}
    for device in ("cpu", "cuda"):
        z, image, mask, e = (t.to(device) for t in parts)
        z = z.requires_grad_()
        e = e.requires_grad_()
        loss = tree_energy_loss(z, image, mask, e)
        losses[device] = loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, (z, e)))
    for name, a, b in zip(("loss", "logits", "feature"), losses["cpu"], losses["cuda"]):
        assert_close(name, a, b, 1e-4)
