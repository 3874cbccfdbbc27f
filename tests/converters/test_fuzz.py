"""Some hundred damaged files of each kind; and that the loop which reads them notices what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.converters.fuzz import KINDS, file_of

ROOT = Path(__file__).parent.parent.parent


def test_damaged_files_end_in_clear_errors(tmp_path):
    command = [sys.executable, "-m", "tests.converters.fuzz", "--runs", "200", "--seed", "1000", "--keep", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [kind.name for kind in KINDS]
    for kind, (name, files, _, refused, errors, *_) in zip(KINDS, rows, strict=True):
        assert int(files) == 200 // kind.every, name
        assert int(refused) > int(files) / 2, name
        assert int(errors) >= 2, name
    assert list(tmp_path.iterdir()) == []


READERS = {
    "raise KeyError('x')": "KeyError: 'x'",
    "raise MemoryError": "MemoryError",
    "while True: pass": "ended by SIGPROF: more than 0.2 s",
    "os.kill(os.getpid(), signal.SIGSEGV)": "ended by SIGSEGV",
    "os._exit(3)": "the process ended with",
    "bytes(1 << 20)": "bytes of memory for a file of",
    "bytes(1 << 31)": "MemoryError",
}


@pytest.mark.parametrize("reader", READERS)
def test_failures_are_seen(reader, tmp_path):
    """A reader that fails at every file of which the first byte was changed."""
    code = f"""
import os, signal, sys
from tests.converters import fuzz

def read(data):
    if data[:1] != b"a":
        {reader}
    return []

fuzz.LIMIT_S = 0.2
fuzz.KINDS[:] = [fuzz.Kind("bad", lambda: [fuzz.Seed([b"a", b"b"])], read)]
sys.exit(fuzz.main(["--runs", "12", "--keep", {str(tmp_path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert READERS[reader] in done.stderr
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == done.stderr.count("error: ") >= 2
    assert all(path.read_bytes()[:1] != b"a" for path in kept)


def test_a_file_can_be_made_again():
    kind = KINDS[0]
    files = [file_of(kind, kind.seeds(), 0, number) for number in range(50)]
    assert files == [file_of(kind, kind.seeds(), 0, number) for number in range(50)]
    assert len(set(files)) > 45
    assert files != [file_of(kind, kind.seeds(), 1, number) for number in range(50)]
