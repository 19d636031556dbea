"""The golden outputs of the checkout."""

from segkern.testing import fixture


def need(name):
    "A fixture; a checkout has all of them."
    found = fixture(name)
    assert found is not None, f"tests/fixtures has no '{name}'"
    return found
