"""One thread: these tensors are small."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass
