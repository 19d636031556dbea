"""Training as the official trainers train: their recorded steps, and where none are recorded, plain formulas."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared import need
from test_light_zoo import CUSTOM, HEAD, official_groups, STILL
from test_tree import dense
from trajectory import compared, Facts, precision, RUNS, Replay, single_precision, without_chance
from segkern.core import recipe_for, seeded
from segkern.losses.tree import minimum_spanning_tree
from segkern.models import create_model
from segkern.testing import filled, make_input, relative_l2
from segkern.testing.toys import toy
from segkern.train.loop import set_rate
from segkern.train.optim import parameter_groups
from segkern.train.order import Epochs
from segkern.train.schedule import lr_at
from segkern.train.start import prepare_model, training_eps
from segkern.train.step import accelerator_for, forward_backward, optimizer_step, start_run
from segkern.weights import map_key

EXACT = 1e-8  # a faithful implementation in double precision differs by rounding only
DISTANCES = ("rates", "loss", "parts", "gradient norm", "updates", "numbers")


@pytest.mark.parametrize("name", RUNS)
def test_official_steps_in_double(name):
    "Rates of every parameter, losses, gradient norm and the update of every tensor, over eight steps."
    need(name)
    row = compared(name)
    assert row["tensors"] > 100
    # mmcv makes the warm-up's factor from other roundings of the same numbers
    assert {k: row[k] for k in DISTANCES if row[k] > EXACT} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_official_losses_in_single(name):
    "As close to the official run in double as the official run in single is, or 1e-4."
    drift = need(name).spec["drift"]["loss_per_step"]
    steps = need(name).spec["fp32_steps"]
    assert single_precision(name) <= max(1e-4, 3 * max(drift[:steps]))


def test_a_wrong_rule_shows():
    "Each of the differences that were once there is far above the tolerance."
    need("train_sanet_s")
    replay = Replay("train_sanet_s")
    replay.run.recipe = replay.recipe.replace(lag=0)
    losses = [losses["loss"] for _, losses, _ in replay.steps(3)]
    golden = replay.golden.golden["loss"][:3]
    assert np.abs(losses / golden - 1).max() > 100 * EXACT
    replay = Replay("train_s2fpn_cityscapes")
    replay.run.recipe = replay.recipe.replace(bn_eps=1e-5)
    (_, losses, _) = replay.steps(1)[0]
    assert abs(losses["loss"] / replay.golden.golden["loss"][0] - 1) > 100 * EXACT


@pytest.mark.parametrize("name", ["train_s2fpn_camvid", "train_s2fpn_cityscapes"])
def test_every_norm_trains_with_its_official_eps(name):
    replay = Replay(name)
    norms = {n for n, m in replay.net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen = set()
    with training_eps(replay.net, replay.recipe.bn_eps):
        for eps, modules in replay.golden.spec["bn"]["eps"].items():
            ours = {n for m in modules for n in replay.names().get(f"{m}.weight", ())}
            ours = {n.removesuffix(".weight") for n in ours} & norms
            assert {replay.net.get_submodule(n).eps for n in ours} == {float(eps)}
            seen |= ours
    assert seen == norms


def test_sanets_rates_through_real_epochs():
    """The official loop, written out: ceil(n / batch) batches, a counter that knows floor(n / batch), and a rate that
    is set behind the step."""
    n, batch, epochs = 30, 4, 5
    recipe = recipe_for("sanet_s", "cityscapes", batch=batch, iterations=epochs * (n // batch))
    official = []
    rate = recipe.lr
    for epoch in range(epochs):
        left = n
        for i in range(math.ceil(n / batch)):
            official.append((min(batch, left), rate))
            left -= batch
            counter = epoch * (n // batch) + i
            rate = recipe.lr * (1 - counter / (epochs * (n // batch))) ** 0.9
    runs = Epochs(n, recipe)
    ours = [(len(runs.keys(0, t)), lr_at(recipe, runs.counted(t))) for t in range(runs.total)]
    assert ours == official
    cityscapes = recipe_for("sanet_s", "cityscapes")
    assert Epochs(2975, cityscapes).total == 484 * 248 and Epochs(2975, cityscapes).last == 11
    assert Epochs(468, recipe_for("sanet_s", "camvid")).total == 150 * 59


def test_fit_trains_on_the_uncounted_batch(tmp_path):
    "As many steps as batches, pictures of the last one included, and the rate of the counter in metrics.jsonl."
    from segkern.data import open_dataset
    from segkern.train import fit
    from segkern.train.folder import history

    recipe = recipe_for(
        "sanet_s", "streets", batch=4, iterations=6, lag=1, schedule="poly", warmup=0
    )
    recipe = recipe.replace(last_batch="uncounted", edges=False, crop=(32, 48), ema=0.0)
    data = open_dataset("streets", size=(32, 48), length=14)
    found = fit(toy(num_classes=11), recipe, data, out=tmp_path / "run", log_every=1)
    rates = [r["lr"] for r in history(tmp_path / "run") if "lr" in r]
    epochs = Epochs(14, recipe)
    assert found["steps"] == epochs.total == 8 and len(rates) == 8
    assert rates == [lr_at(recipe, epochs.counted(t)) for t in range(8)]


def poly(base, t, total, power=1.0, low=0.0):
    return (base - low) * (1 - t / total) ** power + low


def warm(rate, t):
    "mmcv's linear warm-up over 1500 iterations: a factor."
    return rate * (1 - (1 - t / 1500) * (1 - 1e-6)) if t < 1500 else rate


def full(z, target, align_corners=False):
    return F.interpolate(z, target.shape[-2:], mode="bilinear", align_corners=align_corners)


def over_all_pixels(z, target):
    "OpenMMLab's cross-entropy: ignored pixels count in the divisor."
    z = full(z, target)
    return F.cross_entropy(z, target, ignore_index=255, reduction="sum") / target.numel()


def plain_loss(net, x, target):
    "Main head, and 0.4 of an auxiliary one."
    out = net.outputs(x)
    aux = 0.4 * over_all_pixels(out["aux"], target) if "aux" in out else 0
    return over_all_pixels(out["logits"], target) + aux


def regions_loss(net, x, target):
    "OCRNet: its answer, and 0.4 of the regions that it starts from."
    out = net.outputs(x)
    return over_all_pixels(out["logits"], target) + 0.4 * over_all_pixels(out["aux"], target)


def tree_loss(net, x, target):
    "Labels at full size; everywhere else the answers, filtered along two trees by path products."
    labels = torch.where(target < 0, 255, target)
    seen = net.decode(net.encoder(x))
    logits = net.classify(seen)
    ce = F.cross_entropy(full(logits, labels, True), labels, ignore_index=255)
    h, w = logits.shape[2:]
    small = F.interpolate((target == -1)[:, None].double(), (h, w), mode="nearest")[:, 0]
    p = logits.softmax(1)
    picture = F.interpolate(net.preprocess.undo(x).double() / 255, (h, w), mode="bilinear")
    embedded = net.tree_embed(seen)
    total = 0
    for b in range(len(x)):
        y = p[b].flatten(1)
        for feature, sigma in ((picture[b], net.tree_sigma), (embedded[b], 1.0)):
            edges = minimum_spanning_tree(feature[None].detach())[0]
            flat = feature.flatten(1)
            d2 = (flat[:, edges[:, 0]] - flat[:, edges[:, 1]]).square().sum(0)
            y = dense(y, edges, (-d2 / sigma).exp())
        total = total + (small[b].flatten() * (p[b].flatten(1) - y).abs()).sum()
    return ce + net.tree_weight * total / small.sum()


def nvlabs(official):
    "SegFormer's own configuration: heads ten times, norms and position blocks without decay."
    words = {"pos_block": STILL, "norm": STILL, "head": HEAD}
    return official_groups(official, words)


def swin(keys):
    words = {"absolute_pos_embed": STILL, "relative_position_bias_table": STILL, "norm": STILL}
    return official_groups(keys, words)


def ours_by_official(net, keys, groups):
    "Our parameter -> (factor, decay), by the official name that holds it."
    found = {}
    rules = net.key_rules(dict.fromkeys(keys, torch.empty(0)))
    for key, group in groups(keys).items():
        name, _ = map_key(net.rename(key) if hasattr(net, "rename") else key, rules)
        for n in name if isinstance(name, tuple) else (name,):
            if n is not None:
                found[n] = group
    return found


def layers(name, depth):
    "ViT-Adapter on ADE20K: 0.95 for each layer below the top."
    parts = name.split(".")
    top = depth + 1
    if name.startswith(("encoder.pos_embed", "encoder.embed.")):
        return 0.95**top
    return 0.95 ** (top - 1 - int(parts[2])) if name.startswith("encoder.blocks.") else 1.0


def warmed(base, power=1.0, low=0.0):
    return lambda t: warm(poly(base, t, 160_000, power, low), t)


# model -> its options, the fixture that knows official names, its groups, its rate at an iteration
FAMILIES = {
    "segformer_b0": ({}, "segformer_b0", nvlabs, warmed(6e-5)),
    "upernet_swin_t": (dict(width=32), "ssa_upernet_swin_t", swin, warmed(6e-5)),
    "segnext_t": ({}, "segnext_t", lambda k: official_groups(k, CUSTOM["segnext_t"]), warmed(6e-5)),
    "seaformer_b": (
        {},
        "seaformer_b",
        lambda k: official_groups(k, CUSTOM["seaformer_b"]),
        warmed(2.5e-4),
    ),
    "cgrseg_b": ({}, "cgrseg_b", lambda k: official_groups(k, CUSTOM["cgrseg_b"]), warmed(1.2e-4)),
    "afformer_b": ({}, None, None, warmed(3e-4)),
    "ocrnet_hr48": (dict(width=18), None, None, lambda t: poly(0.01, t, 160_000, 0.9, 1e-4)),
    "vit_adapter_l": (
        dict(width=32, encoder_options=dict(width=64, depth=4, heads=2)),
        None,
        None,
        warmed(2e-5),
    ),
}
DECAY = {"ocrnet_hr48": 5e-4, "vit_adapter_l": 0.05}  # others: 0.01
AT = (0, 1499, 100_000)  # iterations of the three steps


def adamw(p, g, state, rate, decay):
    "The update as its paper writes it."
    state["n"] = n = state.get("n", 0) + 1
    state["m"] = m = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = v = 0.999 * state.get("v", 0) + 0.001 * g * g
    step = m / (1 - 0.9**n) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
    return p * (1 - rate * decay) - rate * step


def sgd(p, g, state, rate, decay):
    "Momentum 0.9, decay as part of the gradient."
    g = g + decay * p
    state["m"] = m = 0.9 * state["m"] + g if "m" in state else g
    return p - rate * m


def written_out(net, loss, x, target, rate, decay, groups, update):
    "Three steps by the formulas of this file; the parameters afterwards."
    states = {n: {} for n, _ in net.named_parameters()}
    for t in AT:
        net.zero_grad()
        with seeded(t):
            loss(net, x, target).backward()
        with torch.no_grad():
            for n, p in net.named_parameters():
                if p.grad is not None:
                    factor, decays = groups.get(n, (1.0, 1.0))
                    p.copy_(update(p, p.grad, states[n], factor * rate(t), decay * decays))
    return dict(net.named_parameters())


def by_fit(net, recipe, facts, x, target):
    "The same three steps by the functions of `fit`."
    run = start_run(None, net, recipe, facts, accelerator_for("cpu", recipe))
    for t in AT:
        run.state["step"] = t
        set_rate(run)
        with seeded(t):
            forward_backward(run, torch.arange(len(x)), x, target)
        optimizer_step(run)
    return dict(net.named_parameters())


def compare_updates(net, recipe, facts, loss, x, target, rate, decay, groups, update):
    "Ours against the formulas, tensor by tensor, as far as it moved."
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    plain = copy.deepcopy(net)
    theirs = written_out(plain.train(), loss, x, target, rate, decay, groups, update)
    ours = by_fit(net.train(), recipe, facts, x, target)
    errors = {}
    grads = {n: p.grad.norm().item() for n, p in theirs.items() if p.grad is not None}
    silent = 1e-11 * max(grads.values())
    for n, p in theirs.items():
        moved = (p - start[n]).detach()
        # a gradient that is zero in theory is rounding, which AdamW blows up to the size of a step
        if grads.get(n, 0) > silent:
            errors[n] = relative_l2(moved, (ours[n] - start[n]).detach())
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-6, (worst, errors[worst])
    assert np.median(list(errors.values())) < EXACT
    return errors


LONG = {"ocrnet_hr48", "upernet_swin_t", "cgrseg_b", "segnext_t"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in FAMILIES]
)
def test_families_without_a_recording(name):
    "Groups by official names, warm-up, decay, objective and update, each written out here."
    options, known, rule, rate = FAMILIES[name]
    fields = {}
    if name == "vit_adapter_l":
        from segkern.models.vit_adapter import layer_decay

        fields = dict(groups=layer_decay(0.95, 4))
    recipe = recipe_for(name, "ade20k", **fields)
    with precision(torch.float64):
        net = without_chance(filled(create_model(name, 150, **options)).double())
        prepare_model(net, recipe, Facts("ade20k"))
        # SeaFormer's attention along one side needs two cells at 1/64
        side = 128 if name == "seaformer_b" else 64
        x = make_input([2, 3, side, side]).double()
        draw = np.random.RandomState(0)
        target = torch.from_numpy(draw.randint(0, 150, (2, side, side)))
        target[:, :3] = 255
        if known:
            keys = list(need(known).state())
            groups = ours_by_official(net, keys, rule)
        elif name == "vit_adapter_l":
            groups = {n: (layers(n, 4), float(p.ndim > 1)) for n, p in net.named_parameters()}
        else:
            groups = {}
        decay = DECAY.get(name, 0.01)
        update = sgd if name == "ocrnet_hr48" else adamw
        loss = regions_loss if name == "ocrnet_hr48" else plain_loss
        errors = compare_updates(
            net, recipe, Facts("ade20k"), loss, x, target, rate, decay, groups, update
        )
    assert len(errors) > 50


def test_tree_energy_without_a_recording():
    "SGD at ten times the base rate, the loss from path products of exact trees."
    recipe = recipe_for("sasformer_sparse_b0", "voc2012")
    with precision(torch.float64):
        net = create_model("sasformer_sparse_b0", 21, tree_weight=0.4, levels=0)
        net = without_chance(filled(net).double())
        with torch.no_grad():
            net.tree_embed[0].weight *= 0.02  # near features: far ones do not see each other
            net.tree_embed[1].weight *= 0.02
        prepare_model(net, recipe, Facts("voc2012"))
        x = make_input([2, 3, 32, 48]).double()
        draw = np.random.RandomState(0)
        target = torch.from_numpy(draw.randint(-1, 21, (2, 32, 48)))
        target[:, :, 12:] = -1
        target[:, :, -8:] = -2

        def rate(t):
            return poly(5e-3, t, 80_000, 0.9) if t < 80_000 else 0.0

        errors = compare_updates(
            net, recipe, Facts("voc2012"), tree_loss, x, target, rate, 1e-4, {}, sgd
        )
    assert any("tree_embed" in n for n in errors)


@pytest.mark.parametrize("name", CUSTOM)
def test_groups_below_the_adaptive_classifier(name):
    "Every layer of the classifier is part of the decode head for the official rules, and so of the head's group."
    own = [k for k in need("ssa_head_segformer_b0").state() if "_pos" in k or "center" in k]
    keys = list(need(name).state()) + own
    with torch.device("meta"):
        net = create_model(f"{name}_ssa", 150, seed=None)
    recipe = recipe_for(net.name, "ade20k")
    want = ours_by_official(net, keys, lambda k: official_groups(k, CUSTOM[name]))
    found = {
        n: (factor, decay / recipe.weight_decay)
        for (factor, decay), members in parameter_groups(net, recipe).items()
        for n, *_ in members
    }
    wrong = {n: (want[n], group) for n, group in found.items() if want.get(n) != group}
    assert wrong == {} and sum(n.startswith("classifier.") for n in found) > 10


def test_pidnets_auxiliary_heads_read_after_the_relu():
    "The official ReLUs work in place on maps that the heads still hold; here they are written out so."
    net = create_model("pidnet_s", 19, seed=0).double().eval()
    x = make_input([1, 3, 64, 96]).double()

    def relu(t):
        return F.relu_(t)

    with torch.no_grad():
        t = relu(net.layer2(relu(net.layer1(net.stem(x)))))
        size = t.shape[-2:]

        def up(z):
            return F.interpolate(z, size, mode="bilinear", align_corners=False)

        p = net.detail3(t)
        d = net.edge3(t)
        t = relu(net.layer3(t))
        p = net.pag3(p, net.compression3(t))
        d = d + up(net.diff3(t))
        kept_p = p
        t = relu(net.layer4(t))
        p = net.detail4(relu(p))
        d = net.edge4(relu(d))
        p = net.pag4(p, net.compression4(t))
        d = d + up(net.diff4(t))
        kept_d = d
        p = net.detail5(relu(p))
        d = net.edge5(relu(d))
        out = net.outputs(x)
        assert relative_l2(net.aux_head(kept_p), out["aux"]) < 1e-12
        assert relative_l2(net.boundary_head(kept_d), out["boundary"]) < 1e-12
        main = net.classifier(net.head(net.bag(p, up(net.spp(net.layer5(t))), d)))
        assert relative_l2(main, out["logits"]) < 1e-12
    assert kept_p.min() == 0 == kept_d.min()
