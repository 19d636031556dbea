"""Phase 1: production shapes against double precision, and what only a GPU can show: races, streams, graphs, alignment.

Sizes of one, odd ones, expanded gradients and layouts are in the ordinary tests of the kernels, which run beside this.
"""

import torch
from child import selected, synchronise
from rows import NotRun, first_line

LIMITS = {
    torch.float32: (5e-6, 2e-5),
    torch.float16: (1e-3, 2e-3),
    torch.bfloat16: (4e-3, 1e-2),
}  # relative L2: forward, backward
LOOSER = dict(msca=4)  # gradients of taps are sums over all pixels of products of two rounded maps
# share of pixels that may differ: ties of rounded logits
COUNTS = dict(upsample_argmax=1e-3, upsample_confusion=2e-3)

SPREADS = ("class_sums",)  # a product with zeros and ones: NaN reaches every class of its channel


def kernel_of(case):
    "The case's op with its kernel."
    return lambda *t: case.fn(*t, impl="triton")


def varied(o):
    "A gradient without a pattern: multiples of the golden ratio; a captured graph takes no random numbers of ours."
    steps = torch.arange(1, max(1, o.numel()) + 1, device=o.device, dtype=torch.float64)
    return (3.4 * (steps * 0.6180339887498949 % 1 - 0.5)).to(o.dtype).view(o.shape)


def both(case, fn, args):
    "Outputs and gradients of one call, as a list, and how many of them are outputs."
    outs = fn(*args)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    graph = [o for o in outs if o.requires_grad] if case.grad else []
    leaves = [a for a in args if a.requires_grad] if graph else []
    seeds = [varied(o) for o in graph]
    grads = torch.autograd.grad(graph, leaves, seeds) if leaves else ()
    return [o.detach() for o in outs] + list(grads), len(outs)


def distance(ref, got):
    "Relative L2 distance in double precision, on the device."
    ref = ref.double()
    got = got.double()
    return float((ref - got).norm() / (ref.norm() + 1e-12))


def laid(args, layout):
    "Maps in channels_last, or at an address that no wide load likes; values and gradients stay."

    def turned(t):
        if not t.is_floating_point():
            return t
        if layout == "last":
            new = (
                t.detach().contiguous(memory_format=torch.channels_last)
                if t.ndim == 4
                else t.detach()
            )
        else:
            flat = torch.empty(t.numel() + 1, device=t.device, dtype=t.dtype)[1:]
            new = flat.copy_(t.detach().reshape(-1)).view(t.shape)
        return new.requires_grad_(t.requires_grad)

    return tuple(turned(t) for t in args)


def agree(case, dtype, got, outs, want):
    "The worst distances of outputs and gradients; raises above the limit."
    if case.op in COUNTS:
        wrong = (got[0].long() - want[0].long()).abs()
        total = want[0].numel()
        if case.op == "upsample_confusion":
            # a pixel in the wrong cell counts in two
            wrong = wrong / 2
            total = int(want[0].sum())
        else:
            wrong = wrong.clamp(max=1)
        share = float(wrong.double().sum()) / total
        if not share < COUNTS[case.op]:
            raise ArithmeticError(f"{share:.2e} of the pixels differ")
        return dict(forward=share)
    errors = [distance(r, g) for r, g in zip(want, got)]
    worst = dict(forward=max(errors[:outs]), backward=max(errors[outs:], default=0.0))
    for way, limit in zip(worst, LIMITS[dtype]):
        if way == "backward":
            limit *= LOOSER.get(case.op, 1)
        if not worst[way] <= limit:
            raise ArithmeticError(
                f"{way}: relative L2 distance {worst[way]:.2e} is above {limit:.0e}"
            )
    return worst


def oracle(fn, *args):
    "What a kernel is compared with. Where that does not fit into memory, nothing was found out about the kernel."
    try:
        return fn(*args)
    except torch.OutOfMemoryError as e:
        raise NotRun(f"the comparison does not fit: {first_line(e)}") from e


def against_double(case, dtype, layout, device):
    "The kernel against its reference in double precision, on the same rounded inputs."
    from segkern.testing.memory import launches

    args = case.make(device, dtype)
    if layout != "nchw":
        args = laid(args, layout)
    with launches() as seen:
        got, outs = both(case, kernel_of(case), args)
    if not seen:
        raise NotRun("the reference ran: the kernel refuses these tensors")
    synchronise(device)
    wide = tuple(
        a.detach().double().requires_grad_(a.requires_grad) if a.is_floating_point() else a
        for a in args
    )
    want, _ = oracle(both, case, lambda *t: case.fn(*t, impl="ref"), wide)
    return agree(case, dtype, got, outs, want)


class Noise:
    "A stream that multiplies matrices for as long as the block runs, to disturb the order of everything else."

    def __init__(self, device):
        self.device = device
        if device.type != "cuda":
            return
        self.stream = torch.cuda.Stream(device)
        self.a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.a)
        torch.cuda.synchronize(device)

    def more(self):
        "Some milliseconds of work."
        if self.device.type != "cuda":
            return
        with torch.cuda.stream(self.stream):
            for _ in range(4):
                torch.mm(self.a, self.a, out=self.out)


def same_bits(name, first, again):
    "Raise where two results differ in a bit; NaN equals NaN."
    for i, (a, b) in enumerate(zip(first, again)):
        equal = (a == b) | ((a != a) & (b != b))
        if not bool(equal.all()):
            raise ArithmeticError(f"{name}: {int((~equal).sum())} numbers of result {i} differ")


def repeated(case, dtype, device, times):
    "The same bits every time, while another stream keeps the device busy."
    args = case.make(device, dtype)
    noise = Noise(device)
    first, _ = both(case, kernel_of(case), args)
    for i in range(times):
        noise.more()
        again, _ = both(case, kernel_of(case), args)
        same_bits(f"run {i + 1} of {times}", first, again)
    synchronise(device)
    return dict(times=times)


def on_a_side_stream(case, dtype, device):
    "The same bits on a stream that is not the default one."
    args = case.make(device, dtype)
    first, _ = both(case, kernel_of(case), args)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        again, _ = both(case, kernel_of(case), args)
    torch.cuda.current_stream(device).wait_stream(side)
    same_bits("side stream", first, again)


def in_a_graph(case, dtype, device):
    "The same bits from a captured graph, replayed on new values of its inputs."
    args = case.make(device, dtype)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            both(case, kernel_of(case), args)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = both(case, kernel_of(case), args)
    with torch.no_grad():
        for a in args:
            if a.is_floating_point():
                a.mul_(0.75)
    graph.replay()
    synchronise(device)
    again = [t.clone() for t in captured]
    first, _ = both(case, kernel_of(case), args)
    same_bits("captured graph", first, again)


def spoilt(case, dtype, device, value):
    "One NaN or infinity in the first tensor: not a number comes out where PyTorch's own composition has it."
    args = case.make(device, dtype)
    with torch.no_grad():
        args[0][tuple(n // 2 for n in args[0].shape)] = value
    args = tuple(a.detach() for a in args)
    got = kernel_of(case)(*args)
    want = oracle(case.plain, *(a.double() if a.is_floating_point() else a for a in args))
    pairs = list(zip(*(t if isinstance(t, (tuple, list)) else (t,) for t in (want, got))))
    for i, (r, g) in enumerate(pairs):
        if not g.is_floating_point():
            continue
        if case.op in SPREADS:
            differ = int((~torch.isfinite(r) & torch.isfinite(g)).sum())
        else:
            differ = int((torch.isnan(r) != torch.isnan(g)).sum())
        if differ:
            raise ArithmeticError(
                f"result {i}: {differ} of {g.numel()} numbers are not finite on one side only"
            )
    return dict(results=len(pairs))


def many_classes(device, tiny):
    "300 classes, more than a label byte holds."
    from segkern import ops
    from segkern.testing import make_input, make_labels

    side = 4 if tiny else 32
    with torch.device(device):
        z = make_input([2, 300, side, side])
        y = make_labels([2, 4 * side, 4 * side], 300)
    return head_agrees(ops.upsample_cross_entropy, z, y)


def head_agrees(loss, z, y, **options):
    "Loss and gradient against double precision."
    pairs = []
    for kind, impl in ((torch.float64, "ref"), (torch.float32, "triton")):
        leaf = z.detach().to(kind).requires_grad_()
        value = loss(leaf, y, impl=impl, **options)
        pairs.append((value, *torch.autograd.grad(value, leaf)))
    errors = dict(zip(("forward", "backward"), (distance(a, b) for a, b in zip(*pairs))))
    if not (errors["forward"] <= 5e-6 and errors["backward"] <= 2e-5):
        raise ArithmeticError(f"distances {errors}")
    return errors


def hard_examples(device, tiny):
    "Mining of hard examples."
    from segkern import ops
    from segkern.testing import make_input, make_labels

    side = 6 if tiny else 96
    with torch.device(device):
        z = 3 * make_input([2, 19, side, side])
        y = make_labels([2, 8 * side, 8 * side], 19, void=0.1)
    return head_agrees(ops.upsample_cross_entropy, z, y, ohem=(0.7, y.numel() // 16))


def all_ignored(device, tiny):
    "Nothing but void: NaN as PyTorch has it or zero on request, and gradients of zero."
    from segkern import ops
    from segkern.testing import make_input

    with torch.device(device):
        z = make_input([2, 19, 8, 8]).requires_grad_()
        y = torch.full((2, 32, 32), 255, dtype=torch.uint8)
    for empty, fine in (("nan", torch.isnan), ("zero", lambda t: t == 0)):
        loss = ops.upsample_cross_entropy(z, y, empty=empty, impl="triton")
        (g,) = torch.autograd.grad(loss, z)
        if not bool(fine(loss)) or bool((g != 0).any()):
            raise ArithmeticError(
                f"empty={empty}: loss {loss.item()}, gradient {g.abs().max().item()}"
            )


def many_sums(device, tiny):
    "Sums of 300 classes."
    from segkern import ops
    from segkern.testing import make_input, make_labels

    side = 6 if tiny else 64
    with torch.device(device):
        x = make_input([2, 48, side, side])
        y = make_labels([2, side, side], 300)
    want, got = (
        ops.class_sums(t, y, 300, impl=impl)[0] for t, impl in ((x.double(), "ref"), (x, "triton"))
    )
    error = distance(want, got)
    if not error <= 5e-6:
        raise ArithmeticError(f"relative L2 distance {error:.2e}")
    return dict(forward=error)


EXTRAS = dict(
    head=(
        ("upsample_cross_entropy", "300 classes", many_classes),
        ("upsample_cross_entropy", "hard examples", hard_examples),
        ("upsample_cross_entropy", "all ignored", all_ignored),
    ),
    prototype=(("class_sums", "300 classes", many_sums),),
)


def checks(family, device, tiny, only):
    "(op, label, function) of everything that is checked."
    out = []
    cuda = device.type == "cuda"
    dtypes = [torch.float32] if tiny else list(LIMITS)
    todo = selected(family, tiny)
    seen = set()
    for case in todo:
        way = f"{case.label}, {'backward too' if case.grad else 'forward'}"
        maps = case.op not in ("sr_attention", "affinity") and "channels last" not in case.label
        for dtype in dtypes:
            kind = str(dtype).split(".")[1]
            for layout in ("nchw", "last") if maps else ("nchw",):
                out.append(
                    (
                        case.op,
                        f"{way}, {kind}, {layout}",
                        lambda c=case, d=dtype, y=layout: against_double(c, d, y, device),
                    )
                )
        if only == "double":
            continue
        kind = torch.float32 if tiny else torch.bfloat16
        out.append(
            (
                case.op,
                f"{way}, repeated beside a product",
                lambda c=case: repeated(c, kind, device, 2 if tiny else 30),
            )
        )
        if case.op in seen:
            continue
        seen.add(case.op)
        out.append(
            (
                case.op,
                f"{way}, misaligned",
                lambda c=case: against_double(c, kind, "misaligned", device),
            )
        )
        for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
            out.append(
                (case.op, f"{way}, {name}", lambda c=case, v=value: spoilt(c, kind, device, v))
            )
        for name, fn in (("captured", in_a_graph), ("side stream", on_a_side_stream)):

            def here(c=case, f=fn):
                if not cuda:
                    raise NotRun("no GPU")
                return f(c, kind, device)

            out.append((case.op, f"{way}, {name}", here))
    extras = () if only == "double" else EXTRAS.get(family, ())
    return out + [(op, label, lambda f=fn: f(device, tiny)) for op, label, fn in extras]


def main(rows, family, device, tiny, facts):
    "Run the checks; `facts['only']` restricts them to those against double precision."
    prefix = facts.get("prefix", "")
    todo = [
        (op, prefix + label, fn)
        for op, label, fn in checks(family, device, tiny, facts.get("only"))
    ]
    rows.plan([(op, label) for op, label, _ in todo])
    for op, label, fn in todo:
        rows.run(op, label, fn)
        if device.type == "cuda":
            torch.cuda.empty_cache()
