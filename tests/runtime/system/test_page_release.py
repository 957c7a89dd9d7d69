"""Pages of a mapped file leave memory, and come back when they are read."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from dovetail.runtime.system import page_release as mapped
from dovetail.runtime.system.page_release import LookupMapping, releasing_pages

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
SIZE = 4 << 20


def resident(file: Path) -> int:
    """KiB of `file` in this process's memory."""
    here, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(file))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@linux
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
        whole = bytes(data)
        assert resident(file) == SIZE >> 10
        with releasing_pages(file):
            assert bytes(data) == whole
        assert resident(file) == 0
        assert bytes(data) == whole


@linux
def test_what_was_written_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(SIZE))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        data[:5] = b"ours!"
        with releasing_pages(file):
            pass
        assert data[:5] == b"ours!"


def test_an_error_inside_is_raised(tmp_path: Path) -> None:
    with pytest.raises(KeyError), releasing_pages(tmp_path / "none.bin"):
        raise KeyError


@linux
def test_what_is_looked_up_does_not_stay_and_what_others_mapped_does(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(256)) * (SIZE // 256))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as other:
        whole = bytes(other)
        with LookupMapping(file) as looked_up:
            own = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        assert bytes(own) == whole and resident(file) == 2 * SIZE >> 10
        looked_up.add(1)
        assert resident(file) == 2 * SIZE >> 10
        looked_up.add(511)
        assert resident(file) == SIZE >> 10 and bytes(own) == whole == bytes(other)
        own.close()
        looked_up.add(512)  # its mapping is gone
        assert resident(file) == SIZE >> 10


@linux
@pytest.mark.parametrize("written", [False, True])
def test_a_private_mapping_is_given_back_if_it_was_not_written_to(tmp_path: Path, written: bool) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x" * SIZE)
    with file.open("rb") as stream, LookupMapping(file) as looked_up:
        own = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        if written:
            own[:5] = b"ours!"
    assert own[-1:] == b"x"
    looked_up.add(512)
    assert (resident(file) > 0) == written and own[:5] == (b"ours!" if written else b"xxxxx")
    own.close()


def test_an_interrupt_at_its_beginning_leaves_others_the_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dovetail.runtime.system.page_release._all_mappings", interrupted)
        with pytest.raises(KeyboardInterrupt), LookupMapping(tmp_path / "weights.bin"):
            pass
    assert not mapped._opening.locked()
