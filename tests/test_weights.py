"Checkpoints: every published container, and every way in which a file can be wrong."

import collections
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import segkern
from segkern.models import create_model, load, save
from segkern.testing import load_fixture, make_input
from segkern.weights import Inert, load_official, read, read_safetensors, unwrap

FIXTURE = load_fixture(Path(__file__).parent / "fixtures" / "s2fpn_v1_r18")


@pytest.fixture(scope="module")
def state():
    return FIXTURE.state()


@pytest.fixture
def model():
    return create_model("s2fpn_v1_r18", 19).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"epoch": 3, "model": s},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    ],
    ids=["bare", "official", "parallel", "compiled"],
)
def test_containers(wrap, state, model, tmp_path):
    "A file in any of the containers gives the golden logits."
    torch.save(wrap(state), tmp_path / "a.pth")
    report = load_official(model, tmp_path / "a.pth")
    assert report.ignored_params == 12_626_990
    with torch.no_grad():
        assert FIXTURE.error("logits", model(FIXTURE.inputs()["x"])) < 2e-5


def test_counters_are_optional_and_loaded(state, model):
    "Integer counters may be there or not."
    keyed = state | {
        "bn1.num_batches_tracked": torch.tensor(7),
        "apf1.sa.bn_sh1.num_batches_tracked": torch.tensor(9),
    }
    load_official(model, keyed)
    assert (
        model.encoder.body.bn1.num_batches_tracked == 7
        and model.apf1.strip.bn_max.num_batches_tracked == 9
    )


def test_nothing_changes_when_loading_fails(state, model):
    "A refused checkpoint leaves every tensor as it was."
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="tensors left empty"):
        load_official(model, {k: v for k, v in state.items() if "gfu1" not in k})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrong_variants(state):
    "The message names the offending keys and what the checkpoint seems to be."
    with pytest.raises(ValueError, match=r"S2FPNv1 \(s2fpn_v1_\*\), r18, 19 classes") as e:
        load_official(create_model("s2fpn_r18", 19), state)
    assert "tensors left empty" in str(e.value)
    with pytest.raises(ValueError, match=r"\(19, 32, 1, 1\), expected \(11, 32, 1, 1\)"):
        load_official(create_model("s2fpn_v1_r18", 11), state)
    with pytest.raises(ValueError, match="r18"):
        load_official(create_model("s2fpn_v1_r34", 19), state)
    with pytest.raises(ValueError, match="is no S2-FPN"):
        load_official(create_model("s2fpn_v1_r18", 19), {"who.knows": torch.ones(1)})
    with pytest.raises(ValueError, match="who.knows"):
        load_official(create_model("s2fpn_v1_r18", 19), state | {"who.knows": torch.ones(1)})


def test_relu_checkpoint_of_the_current_network():
    "Without PReLU slopes the model turns to ReLU, and back where loading fails."
    f = load_fixture(Path(__file__).parent / "fixtures" / "s2fpn_r18")
    relu = {k: v for k, v in f.state().items() if ".act." not in k}
    m = create_model("s2fpn_r18", 19)
    with pytest.raises(ValueError):
        load_official(m, {k: v for k, v in relu.items() if "gfu1" not in k})
    assert m.act == "prelu" and sum(isinstance(x, torch.nn.PReLU) for x in m.modules()) > 40
    report = load_official(m, relu)
    assert (
        m.act == "relu"
        and "ReLU" in report.notes[0]
        and not any(isinstance(x, torch.nn.PReLU) for x in m.modules())
    )


def test_relu_model_round_trip(tmp_path):
    m = create_model("s2fpn_r18", 5, act="relu").eval()
    back = load(save(m, tmp_path / "m.safetensors"))
    x = make_input([1, 3, 24, 32])
    with torch.no_grad():
        assert torch.equal(m(x), back(x))


def moved(path, place):
    "Write a safetensors file again, its header padded so that the tensors begin at `place` modulo 64."
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size] + b" " * ((place - 8 - size) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    return path


@pytest.mark.parametrize("place", [8, 24, 40])
def test_loaded_weights_are_aligned(place, tmp_path):
    """From a file whose tensors lie next to no multiple of 64: every tensor is aligned, the values
    are those saved bit by bit, and so are the logits, since alignment and layout are those of the
    saved network."""
    m = create_model("s2fpn_r18", 5).eval()
    path = moved(save(m, tmp_path / "m.safetensors"), place)
    mapped = safetensors.torch.load_file(path)
    assert sum(v.data_ptr() % 64 != 0 for v in mapped.values()) > 0.5 * len(mapped)
    back = load(path)
    x = make_input([1, 3, 24, 32])
    for state in (back.state_dict(), read(path), read_safetensors(path)[0]):
        assert all(v.data_ptr() % 64 == 0 for v in state.values())
        assert state.keys() == mapped.keys() and all(
            torch.equal(v, mapped[k]) for k, v in state.items()
        )
    with torch.no_grad():
        assert torch.equal(m(x), back(x))


def test_a_file_that_is_written_over_leaves_the_network_alone(tmp_path):
    m = create_model("s2fpn_r18", 5).eval()
    back = load(save(m, tmp_path / "m.safetensors"))
    (tmp_path / "m.safetensors").write_bytes(bytes((tmp_path / "m.safetensors").stat().st_size))
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in m.state_dict().items())


class Evil:
    "A pickle that runs a command."

    def __reduce__(self):
        return os.system, ("touch /tmp/segkern-was-executed",)


def test_code_is_never_executed(tmp_path):
    mark = Path("/tmp/segkern-was-executed")
    mark.unlink(missing_ok=True)
    for name, write in {
        "zip.pth": lambda p: torch.save({"model": {"w": Evil()}}, p),
        "old.pth": lambda p: torch.save({"w": Evil()}, p, _use_new_zipfile_serialization=False),
        "raw.pkl": lambda p: p.write_bytes(pickle.dumps({"w": Evil()})),
    }.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as e:
            read(tmp_path / name)
        assert "Nothing was executed" in str(e.value) and "weights_only" not in str(e.value), str(
            e.value
        )
        assert name == "raw.pkl" or "system" in str(e.value), str(e.value)
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, 100_000])
def test_truncated_files(keep, state, tmp_path):
    "A cut file is an error with its name, whatever its length."
    full = tmp_path / "full.pth"
    cut = tmp_path / "cut.pth"
    torch.save({k: v for k, v in list(state.items())[:40]}, full)
    cut.write_bytes(full.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut.pth"):
        read(cut)


def test_other_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.pth"):
        read(tmp_path / "no.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="page.pth"):
        read(tmp_path / "page.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="bad.safetensors"):
        read(tmp_path / "bad.safetensors")
    torch.save({"epoch": 3, "loss": 1.0}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="epoch"):
        load_official(create_model("dsanet", 5), tmp_path / "empty.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="Tensor"):
        load_official(create_model("dsanet", 5), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="no key table"):
        load_official(torch.nn.Linear(2, 2), {"weight": torch.ones(2, 2)})


def test_a_file_of_ours_is_not_official(tmp_path):
    m = create_model("dsanet", 5)
    path = save(m, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load_official(m, path)
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        load(tmp_path / "other.pth")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_training_checkpoint_of_mmengine(legacy, state, model, tmp_path):
    "History buffers with NumPy arrays and scalars become inert; the weights load."
    names = ["mmengine", "mmengine.logging", "mmengine.logging.history_buffer"]
    HistoryBuffer = type("HistoryBuffer", (), {"__module__": names[-1]})
    module = types.ModuleType(names[-1])
    module.HistoryBuffer = HistoryBuffer
    buffer = HistoryBuffer()
    buffer.__dict__.update(
        _log_history=np.linspace(0, 1, 7),
        _count_history=np.ones(7, dtype=np.int64),
        _max_length=1_000_000,
    )
    hub = dict(
        log_scalars=collections.OrderedDict({"train/loss": buffer}),
        runtime_info=dict(iter=7, last=np.float32(0.5)),
        resumed_keys={},
    )
    sys.modules.update({n: types.ModuleType(n) for n in names[:-1]} | {names[-1]: module})
    try:
        torch.save(
            dict(
                meta=dict(epoch=1, cfg="model = 1"),
                message_hub=hub,
                state_dict=state,
                optimizer=dict(state={}, param_groups=[]),
            ),
            tmp_path / "mm.pth",
            _use_new_zipfile_serialization=not legacy,
        )
    finally:
        for n in names:
            del sys.modules[n]
    got = read(tmp_path / "mm.pth")
    assert isinstance(got["message_hub"]["log_scalars"]["train/loss"], Inert)
    assert load_official(model, tmp_path / "mm.pth").ignored_params == 12_626_990


def test_prefixes_are_stripped_by_name():
    assert set(unwrap({"module.a": torch.ones(1), "module.b": torch.ones(1)})) == {"a", "b"}
    assert set(unwrap({"module.a": torch.ones(1), "b": torch.ones(1)})) == {"module.a", "b"}
    assert set(unwrap({"modules.a": torch.ones(1)})) == {"modules.a"}


def test_encoder_checkpoints():
    "torchvision's keys load into an encoder; a deeper network is refused."
    e = segkern.create_encoder("resnet18")
    official = {
        k.removeprefix("body."): v + 1 if v.is_floating_point() else v
        for k, v in e.state_dict().items()
    }
    report = segkern.load_official(
        e, official | {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    )
    assert report.ignored_params == 513_000 and torch.equal(
        e.body.conv1.weight, official["conv1.weight"]
    )
    with pytest.raises(ValueError, match="tensors left empty"):
        segkern.load_official(segkern.create_encoder("resnet34"), official)


def test_saving_is_atomic(tmp_path, monkeypatch):
    "A disk that fills up while saving leaves the old file."
    m = create_model("dsanet", 5)
    path = save(m, tmp_path / "m.safetensors", source="first")
    old = path.read_bytes()

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="m.safetensors.*free"):
        save(m, path, source="second")
    monkeypatch.undo()
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
