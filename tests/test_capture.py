"""What a CUDA graph cannot hold: numbers that the host asks for, tensors that come from it. Found on fake tensors."""

import collections
import traceback

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segkern.core import Preprocess, constants
from segkern.infer.protocols import whole_labels
from segkern.models import create_model, list_models
from segkern.models.registry import MODELS
from segkern.ops import use_impl


class Asking(TorchDispatchMode):
    "Collects operations that a capture would refuse, with the line of the package that asks for them."

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        # a number in a tensor without dimensions travels as an argument of the kernel
        kinds = {t.device.type for t in inputs if t.ndim or t.is_cuda}
        try:
            out = func(*args, **(kwargs or {}))
        except Exception:
            self.note(func)
            raise
        kinds |= {t.device.type for t in tree_leaves(out) if torch.is_tensor(t)}
        if {"cpu", "cuda"} <= kinds:
            self.note(func)
        return out

    def note(self, func):
        lines = [f for f in traceback.extract_stack() if "/segkern/" in f.filename]
        where = (
            f"{lines[-1].filename.split('/segkern/')[-1]}:{lines[-1].lineno}"
            if lines
            else "outside"
        )
        self.found[f"{func} at {where}"] += 1


def on_fake_gpu(net):
    "Weights, buffers, and tables that follow a move, as fake tensors on a GPU that is not there."

    def moved(t):
        return torch.empty_like(t, device="cuda")

    for m in net.modules():
        for held in (m._parameters, m._buffers):
            for name, t in held.items():
                if t is not None:
                    held[name] = (
                        nn.Parameter(moved(t), False) if held is m._parameters else moved(t)
                    )
        tables = [n for n, t in vars(m).items() if torch.is_tensor(t)]
        follows = not tables or type(m)._apply is not nn.Module._apply
        assert follows, f"{tables} of {type(m).__name__} stay behind in a move"
        for name in tables:
            setattr(m, name, moved(getattr(m, name)))
    return net


def asked(net, impls=("ref",)):
    "What labelling a picture asks that a graph cannot hold, and the error that this led to."
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        on_fake_gpu(net)
        image = torch.empty(1, 3, 90, 120, dtype=torch.uint8, device="cuda")
        for impl in impls:
            with Asking() as mode, use_impl(impl):
                try:
                    labels = whole_labels(net, image, (96, 128))
                except Exception as e:
                    if not mode.found:
                        raise
                    return dict(mode.found), e
            assert labels.shape == (1, 90, 120) and labels.dtype == torch.uint8
            found |= mode.found
    return found, None


def smallest():
    "The first name of every class of networks and of its options, with and without SSAClassifier."
    seen = {}
    for name in list_models():
        entry = MODELS[name.removesuffix("_ssa")]
        seen.setdefault((entry.build, frozenset(entry.fixed), name.endswith("_ssa")), name)
    return list(seen.values())


@pytest.mark.parametrize("name", smallest())
def test_no_network_asks_the_host(name):
    "From bytes to labels, with the reference implementations and with the kernels' operators."
    pytest.importorskip("triton")
    found, error = asked(create_model(name, 19, seed=None).deploy().eval(), ("ref", "triton"))
    assert not found and error is None, f"{found}: {error}"


class Asks(nn.Module):
    "A network with one question to the host."

    name = "asks"
    multiple = 1
    preprocess = Preprocess()

    def __init__(self, ask):
        super().__init__()
        self.ask = ask
        self.table = None

    def predict(self, x, size):
        self.ask(x)
        return torch.zeros(len(x), *size, dtype=torch.uint8, device=x.device)


QUESTIONS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "list": lambda x: x[0, 0, 0].tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "host": lambda x: x.cpu(),
    "table": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "index": lambda x: x[:, [0, 2]],
    "copy": lambda x: torch.ones(3).to(x.device),
    "mixed": lambda x: x[:, torch.tensor([0, 2])],
}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_are_found(kind):
    found, _ = asked(Asks(QUESTIONS[kind]))
    assert found


def test_a_table_that_stays_behind_is_found():
    net = Asks(lambda x: x)
    net.table = torch.ones(3)
    with pytest.raises(AssertionError, match="stay behind"):
        asked(net)


def test_plain_numbers_are_no_questions():
    def nothing(x):
        ramp = torch.arange(128, device=x.device) + constants((1, 2, 3), x).sum()
        return (x * 2 + ramp).masked_fill(x > 0, 1.5)

    found, error = asked(Asks(nothing))
    assert not found and error is None
