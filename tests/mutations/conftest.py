"""What edits of C files share."""

from collections.abc import Iterator

import pytest

from tests.kernels.test_native import COMPILER


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[None]:
    """Libraries of edited sources: in a folder of their own, compiled in a hurry."""
    folder = tmp_path_factory.mktemp("cache")
    hurry = folder / "cc"
    hurry.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O1\n')  # the last -O counts
    hurry.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENLIB_CACHE", str(folder))
        patch.setenv("CC", str(hurry))
        yield
