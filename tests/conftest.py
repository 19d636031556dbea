"""One seed, one thread (or SEGKERN_TEST_THREADS), poisoned memory: what every test runs under.

The tests of the kernels make their tensors on SEGKERN_TEST_DEVICE; "auto", the default, is a CUDA device
where there is one.
"""

import logging
import os
import sys

import torch

# read when triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

from torch.utils._device import _device_constructors  # noqa: E402

from segkern.testing.fill import FRESH, poisoned  # noqa: E402

# remembered before `torch.empty` is replaced: `with torch.device("meta")` looks it up there
_device_constructors()


THREADS = int(os.environ.get("SEGKERN_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)  # for fixtures that outlive a test; every test starts from it again


DEVICE = os.environ.get("SEGKERN_TEST_DEVICE", "auto")  # of the tests of the kernels
if DEVICE == "auto":
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


# few tests that take minutes: first, so that no core waits for them at the end
LONG = ("test_compile_targets.py", "test_papers.py", "test_mutants.py")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow or `make test-all`"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    threads = torch.get_num_threads()
    log = logging.getLogger("segkern")
    handlers = list(log.handlers)
    level = log.level
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    # an output of segkern that is not fully written fails its test
    for owner, name in FRESH:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), callers="segkern"))
    yield
    torch.set_num_threads(threads)
    log.handlers[:] = handlers  # the command line sets up logging for its process
    log.setLevel(level)
    # or the next model compiled has symbolic sizes, because this one had others
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _device(request, monkeypatch):
    "Kernels meet tensors of the test device, and references of the same precision."
    if DEVICE == "cpu" or not request.path.name.startswith("test_kernels_"):
        yield
        return
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.device(DEVICE):
        yield


@pytest.fixture(scope="session")
def camvid():
    "The real CamVid folder, or skip."
    from segkern.testing import shared

    root = shared("data/camvid")
    if root is None:
        pytest.skip("the shared CamVid folder is not beside the checkout")
    return root


@pytest.fixture
def cv2():
    return pytest.importorskip("cv2")


@pytest.fixture
def call(capsys):
    "Call the command: (exit code, stdout, stderr)."
    from segkern import cli

    def run(*args):
        code = cli.main([str(a) for a in args])
        return code, *capsys.readouterr()

    return run
