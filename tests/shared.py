"""The golden outputs beside the checkout."""

import pytest

from segkern.testing import fixture


def need(name):
    "A fixture, or skip."
    found = fixture(name)
    if found is None:
        pytest.skip("the shared fixtures are not beside the checkout")
    return found
