"""What ranks compare before their first exchange."""

from importlib.metadata import PackageNotFoundError

import pytest

from fxpass.runtime import agreement


def test_a_checkout_that_is_not_installed_has_a_version_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(agreement, "version", missing)
    assert agreement._version() == "not installed"
