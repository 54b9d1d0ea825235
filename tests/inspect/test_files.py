"""Files are complete or not there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fxpass.inspect.files import replacing


def put(path: Path, text: str = "new") -> None:
    with replacing(path) as part:
        part.write_text(text)


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_after_the_file_is_in_place_is_not_hidden_by_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(*paths: Path) -> None:
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "new"


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    link, path = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(path)
    for text in ("first", "second"):  # at first the link leads nowhere
        put(link, text)
        assert link.is_symlink()
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(path.read_text()), daemon=True)
    reader.start()
    put(path)
    reader.join(10)
    assert found == ["new"]
    assert path.is_fifo()


def test_a_new_file_has_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "usual").touch()
    put(path)
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    path.chmod(0o600)
    put(path, "again")
    assert path.stat().st_mode & 0o777 == 0o600
