"Phase 4: whole networks: latency of one picture, and steps of training."

import contextlib
import statistics
import time

import torch
from child import synchronise

CITY = ("cityscapes", 19)
ADE = ("ade20k", 150)
VOC = ("voc2012", 21)
# network -> dataset, classes, picture, size of a dry run
LATENCY = {
    "s2fpn_r18": (*CITY, (1024, 2048), (64, 128)),
    "segformer_b0": (*ADE, (512, 512), (64, 64)),
    "segformer_b5": (*ADE, (512, 512), (64, 64)),
    "segnext_l": (*ADE, (512, 512), (64, 64)),
    "seaformer_l": (*ADE, (512, 512), (64, 64)),
    "cgrseg_l": (*ADE, (512, 512), (64, 64)),
}
COMPILED = ("s2fpn_r18", "segformer_b0")
# network -> dataset, classes, pictures, crop
TRAINING = {
    "segformer_b0": (*ADE, 16, (512, 512)),
    "s2fpn_r18": (*CITY, 8, (1024, 1024)),
    "segformer_b5": (*ADE, 8, (512, 512)),
    "segnext_l": (*ADE, 8, (512, 512)),
    "sasformer_sparse_b4": (*VOC, 4, (512, 512)),
    "ocrnet_hr48_ssa": (*ADE, 8, (512, 512)),
}


def network(name, dataset, classes):
    "A network with random weights."
    import segkern

    return segkern.create_model(name, num_classes=classes, dataset=dataset)


def median_ms(call, device, times):
    "Median milliseconds of a call, each waited for."
    found = []
    for _ in range(times):
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def captured(call):
    "The call as a CUDA graph."
    from segkern.bench.contenders import captured_graph

    return captured_graph(call)


def latency(name, device, tiny):
    "Rows of one network: implementation, layout, eager or captured: (facts, function that gives the time)."
    from segkern.infer import optimize

    dataset, classes, size, small = LATENCY[name]
    base = network(name, dataset, classes).eval().to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(1, 3, *(small if tiny else size), device=device)
    inputs = dict(size="x".join(map(str, x.shape[2:])), batch=1, dtype=str(dtype).split(".")[1])

    def form_of(last, form):
        "What is called: the rewritten network itself, or `optimize` as users call it."
        if form == "as users call it":
            product = optimize(base, dtype=dtype)
            return lambda: product(x)
        net = optimize(base, channels_last=last, dtype=dtype).net
        y = x.to(
            dtype=dtype, memory_format=torch.channels_last if last else torch.contiguous_format
        )
        if form == "compile":
            net = torch.compile(net, mode="reduce-overhead", dynamic=False)
        return lambda: net(y)

    def timed(impl, last, form):
        from segkern.ops import use_impl

        call = form_of(last, form)
        with torch.inference_mode(), use_impl(impl):
            for _ in range(1 if tiny else 3):
                call()
            synchronise(device)
            fast = captured(call) if form == "graph" else call
            ms = median_ms(fast, device, 1 if tiny else 15)
        layout = "last" if last else "nchw"
        return inputs | dict(
            network=name, what="latency", impl=impl, layout=layout, form=form, ms_50=ms
        )

    impls = ("ref",) if device.type == "cpu" else ("ref", "triton")
    out = [
        (impl, last, form)
        for last in (False, True)
        for impl in impls
        for form in ("eager", "graph")
    ]
    out.append(("auto", True, "as users call it"))
    if name in COMPILED:
        out.append(("ref", True, "compile"))
    for impl, last, form in out:
        label = f"{name}, {impl}, {'channels last' if last else 'NCHW'}, {form}"
        yield label, form, lambda i=impl, c=last, f=form: timed(i, c, f)


def training(name, impl, device, tiny):
    "Median of eight steps and the most memory."
    from segkern.ops import use_impl
    from segkern.testing import make_labels

    dataset, classes, batch, size = TRAINING[name]
    if tiny:
        batch = 2
        size = (64, 64)
    net = network(name, dataset, classes).train().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5)
    x = torch.randn(batch, 3, *size, device=device)
    with torch.device(device):
        y = make_labels([batch, *size], classes, void=0.05).to(torch.uint8)
    half = (
        torch.autocast("cuda", torch.bfloat16)
        if device.type == "cuda"
        else contextlib.nullcontext()
    )

    def step():
        optimizer.zero_grad(set_to_none=True)
        with half:
            loss = net(x, y)["loss"]
        loss.backward()
        optimizer.step()

    with use_impl(impl):
        for _ in range(1 if tiny else 3):
            step()
        synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ms = median_ms(step, device, 2 if tiny else 8)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return dict(
        network=name,
        what="training",
        impl=impl,
        layout="nchw",
        form="eager",
        size="x".join(map(str, size)),
        batch=batch,
        dtype="bfloat16 autocast",
        ms_50=ms,
        peak_mb=peak,
    )


def main(rows, family, device, tiny, facts):
    "One network; `facts['what']` is latency or training."
    from rows import NotRun

    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if facts["what"] == "training":
        impls = ("ref",) if device.type == "cpu" else ("triton", "ref")
        for impl in impls:
            rows.run(
                "", f"{family}, training, {impl}", lambda i=impl: training(family, i, device, tiny)
            )
        return
    for label, form, fn in latency(family, device, tiny):

        def timed(form=form, fn=fn):
            if form in ("graph", "compile") and device.type != "cuda":
                raise NotRun("no GPU")
            return fn()

        rows.run("", label, timed)
