import pytest
from exactness import poison

from fastlora import backends


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Each back-end that runs here, pinned, with fresh memory filled with NaN."""
    missing = backends.native()[1]
    if request.param == "native" and missing:
        pytest.skip(missing)
    with backends.use_backend(request.param), poison():
        yield request.param
