"""Lists an HDF5 file: run as a process of its own by :mod:`converters.hdf5`, with nothing of this package.

The library that reads HDF5 is written in C; a damaged file can make it hang, crash or take all memory. Then only this process ends.
"""

from __future__ import annotations

import json
import pathlib
import resource
import sys
from typing import Any

import h5py

MAX_CPU_S = 10
MAX_MEMORY_BYTES = 1 << 30
MAX_OBJECTS = 10_000


class ListingError(Exception):
    """What is wrong, and the next step."""


def listing(path: str) -> dict[str, Any]:
    """``tensors``: name, dtype, shape and place in the file (None: in pieces) of each dataset; ``attributes``: the root's texts.

    Links are not followed, neither within the file nor out of it, and no filter (compression) is run.

    Raises:
        ListingError: there are links, or too many objects.
        Exception: h5py raises what it likes for a damaged file: KeyError, RuntimeError, ValueError, OSError, …
    """
    tensors: list[tuple[str, str, tuple[int, ...] | None, int | None]] = []
    with h5py.File(path, "r") as file:
        attributes = {str(name): value for name, value in file.attrs.items() if isinstance(value, str)}
        todo = [("", file["/"].id)]
        seen = set()
        while todo:
            where, group = todo.pop()
            for raw in group:  # the low-level interface, which takes half the time
                name = raw.decode("utf-8", "surrogateescape")
                inner = f"{where}/{name}" if where else name
                if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                    raise ListingError(f"{inner[:100]!r} is a link", "links are not followed; save the file again without them")
                item = h5py.h5o.open(group, raw)
                place = h5py.h5o.get_info(item).addr
                if place in seen:
                    raise ListingError(f"{inner[:100]!r} is there under two names", "save the file again without links")
                seen.add(place)
                if len(seen) > MAX_OBJECTS:
                    raise ListingError(f"more than {MAX_OBJECTS} groups and datasets", "no checkpoint has as many")
                if isinstance(item, h5py.h5g.GroupID):
                    todo.append((inner, item))
                elif isinstance(item, h5py.h5d.DatasetID):
                    empty = item.get_space().get_simple_extent_type() == h5py.h5s.NULL
                    tensors.append((inner, item.dtype.str, None if empty else item.shape, _offset(item)))
    return {"tensors": tensors, "attributes": attributes}


def _offset(dataset: h5py.h5d.DatasetID) -> int | None:
    """None: in pieces, filtered, virtual, or in another file."""
    created = dataset.get_create_plist()
    if created.get_layout() != h5py.h5d.CONTIGUOUS or created.get_external_count() or created.get_nfilters():
        return None
    return dataset.get_offset()


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    """Prints the listing of the file ``argv[1]``, or what is wrong with it, as JSON."""
    if sys.platform == "linux":
        size_bytes = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, size_bytes + MAX_MEMORY_BYTES)
    _limit(resource.RLIMIT_CPU, MAX_CPU_S)
    try:
        found = listing(sys.argv[1])
    except ListingError as error:
        found = {"error": error.args}
    except Exception as error:
        found = {"error": (f"the HDF5 file is damaged: {error}", "download or copy the file again")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
