"""What a command may fail with. A message says what, where, why and what to do instead."""

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


class WrongInput(ValueError):
    """The input can't be used as it is: a file, a flag, a value."""

    exit_status = 2


class Failed(RuntimeError):
    """The input was fine and the work could not be done."""

    exit_status = 1


def some(names: Iterable[object], most: int = 8) -> str:
    """The first few of a list for a message, and how many more there are."""
    every = [str(name) for name in names]
    more = f" ... and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def absent(path: Path) -> str:
    """That a file is not there, and what is: the folder it was looked for in, and the name that comes nearest."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}, seen from {Path.cwd()}"
    try:
        names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        names = []
    stems = difflib.get_close_matches(path.stem, [Path(name).stem for name in names], 1, 0.6)
    near = [name for name in names if Path(name).stem in stems]
    alike = near or [name for name in names if path.suffix and name.endswith(path.suffix)]
    there = f"; did you mean {folder / alike[0]}?" if near else f"; it has {some(alike)}" if alike else ""
    return f"{path}: no such file in {folder.resolve()}{there}"


GIVE_A_FILE = "Give -o a file in a folder that is there and can be written."
GIVE_A_STORE = "Give --store a folder that is there and can be written, or that can be made."
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
MISTAKEN = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], instead: str = GIVE_A_FILE) -> Iterator[None]:
    """Around the making of `path`: that it can't be written is told in words, as WrongInput for a place where no file can
    be, as Failed for one that refuses it or is full. An OSError of another file passes.

    instead  a sentence: what to give, or do
    """
    try:
        yield
    except OSError as error:
        if not _concerns(Path(path), error):
            raise
        raise unwritable(path, error, instead) from error


def unwritable(
    path: str | os.PathLike[str], error: OSError, instead: str = GIVE_A_FILE
) -> WrongInput | Failed:
    """What to raise for an OSError that was met while `path` was written."""
    place = Path(path)
    nowhere = error.errno == errno.ENOENT and not place.absolute().parent.is_dir()
    if error.errno in FULL:
        return Failed(
            f"{place} can't be written: {os.strerror(error.errno or 0)}. Make room there, or write to another disk."
        )
    file = next((p for p in (place, *place.absolute().parents) if p.is_file()), None)
    if nowhere:
        why = f"there is no folder {place.parent}"
    elif error.errno == errno.EISDIR:
        why = "it is a folder"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST) and file is not None:
        why = f"{'it' if file == place else file} is a file, not a folder"
    elif error.errno == errno.ENOENT:
        why = f"{place.absolute().parent} takes no new file"
    else:
        why = os.strerror(error.errno) if error.errno else str(error)
    kind = WrongInput if nowhere or error.errno in MISTAKEN else Failed
    return kind(f"{place} can't be written: {why}. {instead}")


def _concerns(place: Path, error: OSError) -> bool:
    """Whether the error is one of writing there: of the file itself, one beside it on its way there, or no file by name."""
    if not isinstance(error.filename, str):
        return (
            error.filename is None
            and bool(error.errno)
            and not isinstance(error, ConnectionError | TimeoutError)
        )
    met, place = Path(error.filename).absolute(), place.absolute()
    beside = met.parent == place.parent and met.name.startswith((f".{place.name}", place.name))
    return beside or met in place.parents or place in met.parents
