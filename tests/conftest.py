"""Fixtures every test folder shares."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_prep.sample import prepare_sample
from sepllm_train.base import files
from tests.golden.archives import NAMES, unpack

REPOSITORY = Path(__file__).resolve().parent.parent


def restore_signals() -> None:
    """Give the signals that tests send their default handling, which the processes that tests start inherit.

    A shell starts what it puts in the background with SIGINT and SIGQUIT ignored; other launchers block or ignore more.
    """
    handlers = dict.fromkeys((signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP), signal.SIG_DFL)
    for number, handler in {signal.SIGINT: signal.default_int_handler, **handlers}.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, *handlers])


restore_signals()
# On a busy machine an example may take any time.
settings.register_profile("any load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any load")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: of several workers none is left with a long one when the others have ended."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the stored files of tests/golden, unpacked: tests do not write in it."""
    folder = tmp_path_factory.mktemp("golden")
    for name in NAMES:
        unpack(name, folder)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real corpora and tokenizers: $SEPLLM_SHARED_DATA, or `shared/data` beside the checkout."""
    folder = Path(os.environ.get("SEPLLM_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "manifest.json").is_file():
        pytest.skip(f"no real corpora at {folder} (set SEPLLM_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def sample_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the sample corpus, made once for all tests."""
    cache = tmp_path_factory.mktemp("cache")
    prepare_sample(cache)
    return cache


@pytest.fixture(scope="session")
def sample_prefix(sample_cache: Path) -> Path:
    """Prefix of the sample corpus."""
    return prepare_sample(sample_cache)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a filesystem that has no locks, which has not been told yet."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    files._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets what torch.compile makes be found again by other tests of the session, and their processes, but no later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
