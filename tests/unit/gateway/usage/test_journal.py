"""The journal of usage events: what was written down is there after the process has died."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gateway.usage.journal import SEGMENT_BYTES, UsageJournal, read_orphan

WRITE_AND_DIE = """
import os, signal, sys
from pathlib import Path
from gateway.usage.journal import UsageJournal
journal = UsageJournal(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    assert journal.append(b'[%d]\\n' % number)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_after(folder: Path, events: int) -> None:
    subprocess.run([sys.executable, "-c", WRITE_AND_DIE, str(folder), str(events)], check=False, timeout=60)


def test_a_killed_process_leaves_every_event(tmp_path: Path) -> None:
    """The next process finds all lines that were appended, under the batch's own id, also after it was killed itself."""
    killed_after(tmp_path, 100)
    journal = UsageJournal(tmp_path)
    batches = [read_orphan(path) for path in journal.orphans()]
    assert [batch.lines.split() for batch in batches if batch] == [[b"[%d]" % number for number in range(100)]]
    again = [read_orphan(path) for path in journal.orphans()]
    assert again == batches
    journal.close()


def test_files_of_the_living_are_left_alone(tmp_path: Path) -> None:
    """Only a file whose process is dead is an orphan."""
    one, other = UsageJournal(tmp_path), UsageJournal(tmp_path)
    assert one.append(b"[1]\n")
    assert list(other.orphans()) == []
    one.close()
    assert len(list(other.orphans())) == 1
    other.close()


def test_an_unfinished_line_is_dropped(tmp_path: Path) -> None:
    """A process may die while it copies: what follows the last whole line does not count, nor does a file that was being emptied."""
    cut, emptied = tmp_path / "cut.usage", tmp_path / "emptied.usage"
    cut.write_bytes(b"abc\n[1]\n[2" + bytes(100))
    emptied.write_bytes(bytes(6) + b"3\n[1]\n" + bytes(100))
    batch = read_orphan(cut)
    assert batch is not None
    assert (batch.id, batch.lines) == ("abc", b"[1]\n")
    assert read_orphan(emptied) is None


def test_segments_are_used_again(tmp_path: Path) -> None:
    """A full segment makes room by rotation; a stored one is empty when its turn comes again."""
    for folder in (tmp_path, None):
        journal = UsageJournal(folder)
        line = b"x" * 100_000 + b"\n"
        assert journal.append(line)
        assert journal.append(line)
        assert not journal.append(line)
        filled = journal.rotate()
        assert filled is not None
        first = filled.batch()
        assert len(first.lines) == 2 * len(line) < SEGMENT_BYTES
        journal.release(filled)
        assert not journal.has_events
        assert journal.append(b"[1]\n")
        second = journal.rotate()
        assert second is not None
        assert second.batch().lines == b"[1]\n"
        assert journal.append(b"[2]\n")
        third = journal.rotate()
        assert third is filled
        assert third.batch().lines == b"[2]\n"
        assert third.batch().id != first.id
        journal.close()


def test_an_orderly_end_leaves_no_empty_file(tmp_path: Path) -> None:
    """Files without events are removed."""
    journal = UsageJournal(tmp_path)
    journal.close()
    assert list(tmp_path.iterdir()) == []
