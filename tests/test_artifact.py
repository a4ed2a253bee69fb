"""Artefacts are whole or absent, and verified."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from trimtab.artifact import Store, read_jsonl, write_atomic
from trimtab.errors import Fault, UserError

ID = "ab" * 32


def make(store: Store, text: str = "hello", id: str = ID) -> Path:
    with store.create("corpus", id, config={"a": 1}, inputs={}, versions={}) as draft:
        (draft.path / "deep").mkdir()
        (draft.path / "deep" / "file.txt").write_text(text)
    return store.directory("corpus", id)


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not store.has("corpus", ID)
    make(store)
    artifact = store.open("corpus", ID, verify=True)
    assert artifact.manifest["files"]["deep/file.txt"]["bytes"] == 5
    assert artifact.manifest["config"] == {"a": 1}
    assert not (tmp_path / ".draft").exists() or not any((tmp_path / ".draft").iterdir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "manifest value", "other"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    path = make(store)
    file = path / "deep" / "file.txt"
    if damage == "flip":
        file.write_text("hellp")
    elif damage == "truncate":
        file.write_text("hell")
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest value":
        text = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(text.replace('"a": 1', '"a": 2'))
    elif damage == "manifest":
        (path / "manifest.json").write_text("{")
    else:
        path.rename(store.directory("corpus", "cd" * 32))
    id = "cd" * 32 if damage == "other" else ID
    with pytest.raises(Fault, match=r"delete .* and run again"):
        store.open("corpus", id, verify=True)


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.create("corpus", ID, config={}, inputs={}, versions={}) as draft:
        (draft.path / "half").write_text("x")
        raise ZeroDivisionError
    assert not store.has("corpus", ID)
    assert not list((tmp_path / ".draft").iterdir())


def test_a_kill_after_the_rename_leaves_no_work_behind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store)
    store.work("corpus", ID).mkdir(parents=True)  # what a kill between the rename and the clearing leaves
    other = store.work("corpus", "cd" * 32)
    other.mkdir()
    store.clear_drafts()
    assert not store.work("corpus", ID).exists() and other.exists()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fault, match="no space left"):
        make(store)
    with pytest.raises(Fault, match="no space left"):
        write_atomic(tmp_path / "study.json", "{}")
    monkeypatch.undo()
    assert not store.has("corpus", ID)
    assert not (tmp_path / "study.json").exists()
    make(store)
    store.open("corpus", ID, verify=True)


def test_one_writer_at_a_time_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from trimtab.artifact import Store
        with Store(Path({str(tmp_path)!r})).lock():
            print("held", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match="another trimtab run"), Store(tmp_path).lock():
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with Store(tmp_path).lock():
        pass


def test_a_torn_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2"):
        list(read_jsonl(path))
