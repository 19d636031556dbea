"Encoders of one's own, and what all encoders share."

import hashlib

import pytest
import torch
from torch import nn

import segkern.backbones as backbones
from segkern.backbones import create_encoder, list_encoders, register_encoder
from segkern.backbones.base import download, drop_rates
from segkern.testing import make_input


class Tiny(nn.Module):
    "Two strided convolutions."

    def __init__(self, name, width=4, pretrained=False):
        super().__init__()
        self.name = name
        self.channels = [width, 2 * width]
        self.strides = [2, 4]
        self.first = nn.Conv2d(3, width, 3, 2, 1)
        self.second = nn.Conv2d(width, 2 * width, 3, 2, 1)

    def forward(self, x):
        fine = self.first(x)
        return [fine, self.second(fine)]


@pytest.fixture
def names(monkeypatch):
    "A table of names that the test may write into."
    monkeypatch.setattr(backbones, "_ENCODERS", dict(backbones._ENCODERS))


def test_registered_encoders(names):
    "Listed, created with options and seeds, replaced; one maker serves several names."
    before = list_encoders()
    for name in ("tiny_a", "tiny_b"):
        assert register_encoder(name, Tiny) is Tiny
    assert list_encoders() == [*before, "tiny_a", "tiny_b"] and list_encoders("tiny*") == [
        "tiny_a",
        "tiny_b",
    ]
    e = create_encoder("tiny_b", width=6)
    maps = e(make_input([1, 3, 33, 20]))
    assert e.name == "tiny_b" and [t.shape[1] for t in maps] == e.channels == [6, 12]
    assert torch.equal(e.first.weight, create_encoder("tiny_a", width=6).first.weight)
    assert not torch.equal(e.first.weight, create_encoder("tiny_a", width=6, seed=1).first.weight)
    register_encoder("tiny_a", "segkern.backbones.resnet:ResNet")
    with pytest.raises(ValueError, match="unknown encoder 'tiny_a'; known: resnet18"):
        create_encoder("tiny_a")


def test_refused_names(names):
    "Published names are taken; a maker is callable or a place."
    for name in ("resnet18", "sanet_s", "vit_adapter_l"):
        with pytest.raises(ValueError, match=f"'{name}' is an encoder of segkern"):
            register_encoder(name, Tiny)
    for make in ("no place", None, 3):
        with pytest.raises(ValueError, match="callable or 'module:attribute'"):
            register_encoder("tiny", make)
    assert "tiny" not in list_encoders()
    with pytest.raises(ValueError, match="unknown encoder 'tiny'"):
        create_encoder("tiny")


def test_encoders_of_networks_are_made_on_demand():
    "A name that stands as text."
    with torch.device("meta"):
        assert type(create_encoder("sanet_s", seed=None)).__name__ == "SANetEncoder"


@pytest.mark.parametrize("depths", [[1], [3], [2, 2, 6, 2]], ids=str)
def test_drop_rates(depths):
    "Linear over all blocks, whatever the stages."
    rates = drop_rates(0.3, depths)
    assert [len(r) for r in rates] == depths
    assert sum(rates, []) == torch.linspace(0, 0.3, sum(depths)).tolist()


def test_download(tmp_path, monkeypatch):
    "The checksum in a file's name is compared; a wrong one is refused with the way out."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save({"w": torch.arange(3)}, tmp_path / "toy.pth")
    data = (tmp_path / "toy.pth").read_bytes()
    good = tmp_path / f"toy-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    bad = tmp_path / "toy-00000000.pth"
    for path in (good, bad):
        path.write_bytes(data)
    assert torch.equal(download(good.as_uri())["w"], torch.arange(3))
    with pytest.raises(RuntimeError, match="invalid hash value.*load_official"):
        download(bad.as_uri())
