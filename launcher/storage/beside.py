"""Sizes and sha256 of files, by a process of its own that takes what CPU training leaves over.

A thread of the process that trains would take turns with it for one interpreter and one address space, whatever its
priority; and threads side by side, one for each file, take a share of every core that their niceness alone does not give
back. So one process hashes, one file after the other, niced: where a core is free it uses that one, where every core trains
it gets a tenth of one. The nicest of all would get a hundredth, and on a crowded machine a checkpoint of 256 MiB would wait for
minutes to count.

    python beside.py      a JSON list of paths on stdin; a JSON list of [bytes, sha256] on stdout, null for one that is gone

Standard library only, and nothing of ours: it starts in some hundredths of a second.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys

CHUNK_BYTES = 1 << 20
NICE = 10


def digests(paths: list[str]) -> list[tuple[int, str] | None]:
    """Size and sha256 (hex) of each file, None for one that is gone, a link, or on a bad sector.

    Raises OSError where the process could not do it.
    """
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OSError(errno.EIO, f"the process that hashes ended with status {done.returncode}: {last}")
    return [None if found is None else (int(found[0]), str(found[1])) for found in json.loads(done.stdout)]


def _digest(path: str, buffer: bytearray) -> tuple[int, str] | None:
    sha, size, view = hashlib.sha256(), 0, memoryview(buffer)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        try:
            while count := file.readinto(buffer):
                sha.update(view[:count])
                size += count
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None
    return size, sha.hexdigest()


def main() -> None:
    os.nice(NICE)
    buffer = bytearray(CHUNK_BYTES)
    json.dump([_digest(path, buffer) for path in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
