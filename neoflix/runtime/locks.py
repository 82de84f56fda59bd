"""A lock file: one process at a time works on a folder or a file, on any machine that sees the disk.

The file names its owner. On the owner's machine the process table says at once whether it still runs, so a lock left by
`kill -9` or a reboot holds up nobody. Elsewhere its sign of life does: the owner sets the file's time every 10 seconds,
and a lock whose time has stood still for two minutes belongs to nobody.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError

BEAT = 10.0  # seconds between two signs of life


PATIENCE = (
    120.0  # seconds without one: many beats, since DeepSpeed's CPU Adam may keep a thread waiting for half a minute
)


class Lock:
    """A lock file that this process holds."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):
                os.utime(self._descriptor)  # its own file, even where another process has put one in its place

    def is_held(self) -> bool:
        """Whether the file is still this process's: one that was suspended for minutes may have lost it."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        self._released.set()
        with suppress(OSError):
            if self.is_held():
                self.path.unlink()
        os.close(self._descriptor)


@contextmanager
def locked(path: Path, sentence: str) -> Iterator[Lock]:
    """Holds the lock file at `path`; errors as `acquire`."""
    lock = acquire(path, sentence)
    try:
        yield lock
    finally:
        lock.release()


def acquire(path: Path, sentence: str) -> Lock:
    """Takes the lock file at `path`. OSError where the disk takes no file there.

    Args:
        sentence: what UserError says where another process holds it, with `{owner}` for that one.
    """
    facts = _describe_this_process()
    while (descriptor := _create(path, facts)) is None:
        owner = _read(path)
        if owner is None:
            continue  # it has just gone
        if _is_alive(path, owner):
            raise UserError(sentence.replace("{owner}", _name(owner)))
        _remove(path, owner)
    return Lock(path, descriptor)


def _describe_this_process() -> dict:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kernel": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),  # another one after each boot
        "processes": os.stat("/proc/self/ns/pid").st_ino,  # a container has a process table of its own
    }


def _name(owner: dict) -> str:
    if "process" not in owner:
        return "another process"
    return f"process {owner['process']} on {owner['host']}, since {owner['since']}"


def _create(path: Path, facts: dict) -> int | None:
    """Creates the file and returns its descriptor, locked by `flock` where the disk knows that; None where there is one
    already. It appears with its content where the disk has hard links."""
    mine = path.with_name(f"{path.name}.{facts['id']}")
    try:
        descriptor = _write(mine, facts)
        try:
            os.link(mine, path)
        except FileExistsError:
            pass
        except OSError:  # a disk without hard links
            with suppress(FileExistsError):
                return _write(path, facts)
        with suppress(FileNotFoundError):
            if os.path.samefile(mine, path):  # NFS may report a link that it made as failed
                return descriptor
        os.close(descriptor)
        return None
    finally:
        mine.unlink(missing_ok=True)


def _write(path: Path, facts: dict) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        facts = facts | {"flock": True}
    os.write(descriptor, json.dumps(facts).encode())
    os.fsync(descriptor)
    return descriptor


def _read(path: Path) -> dict | None:
    """The owner that a lock file names, `{}` where it is empty, as a crash may leave it; None where there is no file.
    UserError for a file of another kind."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        content = "?"
    try:
        owner = json.loads(content) if content else {}
    except ValueError:
        owner = None
    if not isinstance(owner, dict) or (content and not {"id", "process", "kernel"} <= owner.keys()):
        raise UserError(f"{path}: is not a lock file of this program, which needs this name; move it away")
    return owner


def _is_alive(path: Path, owner: dict) -> bool:
    here = _describe_this_process()
    if owner.get("kernel") == here["kernel"]:
        if owner.get("processes") == here["processes"]:
            return _start_time(owner["process"]) == owner["began"]
        if owner.get("flock"):  # another container: the kernel, which is the same, lets go of a dead process's locks
            return _is_flocked(path)
    return _is_flocked(path) or _gives_signs_of_life(path)


def _start_time(process: int) -> int | None:
    """When a process began, in ticks since boot; None where there is none, or a dead one that nobody has reaped."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_flocked(path: Path) -> bool:
    """Whether another process holds the file by `flock`; False also where the disk does not know that."""
    try:
        with path.open("rb") as file:  # another user may not write to it
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _gives_signs_of_life(path: Path) -> bool:
    """Watches a file until its time moves, which is True, or has stood still for PATIENCE seconds."""
    try:
        last = path.stat().st_mtime
        patience, began = PATIENCE - (_now(path.parent) - last), time.monotonic()
        if patience > 0:
            say(f"{path}: held by {_name(_read(path) or {})}; waiting for a sign of life, {patience:.0f} s at the most")
        while time.monotonic() - began < patience:
            time.sleep(min(1.0, BEAT))
            with path.open("rb") as file:  # NFS asks the server again for a file that is opened
                if os.fstat(file.fileno()).st_mtime != last:
                    return True
    except FileNotFoundError:
        return False
    return False


def _now(folder: Path) -> float:
    """The time by the clock of the disk, which may be another machine's."""
    probe = folder / f"{uuid.uuid4().hex}.probe"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path, owner: dict) -> None:
    """Removes a dead owner's lock file. Where another process was quicker, and it is a new one, it is put back."""
    doomed = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    if (_read(doomed) or {}).get("id") != owner.get("id"):
        with suppress(FileExistsError):
            os.link(doomed, path)
    doomed.unlink()
