"""Lock files: only one process at a time works on a folder or a file, on all machines that share the disk.

The file names its owner. On the owner's machine the process table shows at once whether it still runs, so that a lock
left by `kill -9` or a reboot blocks nothing. For other machines, the owner updates the file's time every 10 seconds; a
lock whose time has not changed for two minutes is stale.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from neoflix.runtime.console import say
from neoflix.runtime.errors import UserError

BEAT = 10.0  # seconds between two signs of life


# Seconds without one after which a lock is stale: DeepSpeed's CPU Adam may block the thread for half a minute.
PATIENCE = 120.0


class Lock:
    """A lock file that this process holds."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self._descriptor = path, descriptor
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with suppress(OSError):
                os.utime(self._descriptor)  # its own file, even if another process has replaced it

    def is_held(self) -> bool:
        """Whether the file is still this process's; a process that was suspended for minutes may have lost it."""
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


def acquire(path: Path, message: str) -> Lock:
    """Creates the lock file at `path`.

    Args:
        message: of the UserError, with `{owner}` for the process that holds the lock.

    Raises:
        UserError: if another process holds the lock.
        OSError: if no file can be created there.
    """
    facts = describe_owner()
    while (descriptor := _create(path, facts)) is None:
        owner = _read(path)
        if owner is None:
            continue  # it was just removed
        if _is_alive(path, owner):
            raise UserError(message.replace("{owner}", _name(owner)))
        _remove(path, owner)
    return Lock(path, descriptor)


def describe_owner() -> dict:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "began": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "kernel": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),  # differs after each boot
        "processes": os.stat("/proc/self/ns/pid").st_ino,  # a container has its own process table
    }


def _name(owner: dict) -> str:
    if "process" not in owner:
        return "another process"
    return f"process {owner['process']} on {owner['host']}, since {owner['since']}"


def _create(path: Path, facts: dict) -> int | None:
    """Creates the file and returns its descriptor, or None if it exists already.

    It is locked by `flock` if the disk supports that, and appears with its content if the disk supports hard links."""
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
    """The owner that a lock file names: `{}` if it is empty, as a crash may leave it, and None if there is no file.

    Raises:
        UserError: for another kind of file.
    """
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
        raise UserError(f"{path}: not a lock file of this program, which needs this name; move it away")
    return owner


def _is_alive(path: Path, owner: dict) -> bool:
    here = describe_owner()
    if owner.get("kernel") == here["kernel"]:
        if owner.get("processes") == here["processes"]:
            return _start_time(owner["process"]) == owner["began"]
        if owner.get("flock"):  # another container: the same kernel releases the locks of a dead process
            return _is_flocked(path)
    return _is_flocked(path) or _gives_signs_of_life(path)


def _start_time(process: int) -> int | None:
    """When a process began, in ticks since boot; None if it does not run."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_flocked(path: Path) -> bool:
    """Whether another process holds the file by `flock`; False if the disk does not support it."""
    try:
        with path.open("rb") as file:  # another user may not write to it
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _gives_signs_of_life(path: Path) -> bool:
    """Watches a file until its time changes (True) or has not changed for PATIENCE seconds (False)."""
    try:
        last = path.stat().st_mtime
        patience, began = PATIENCE - (_now(path.parent) - last), time.monotonic()
        if patience > 0:
            say(f"{path}: held by {_name(_read(path) or {})}; waiting for a sign of life, {patience:.0f} s at most")
        while time.monotonic() - began < patience:
            time.sleep(min(1.0, BEAT))
            with path.open("rb") as file:  # when a file is opened, NFS asks the server again
                if os.fstat(file.fileno()).st_mtime != last:
                    return True
    except FileNotFoundError:
        return False
    return False


def _now(folder: Path) -> float:
    """The time by the disk's clock, which may be that of another machine."""
    probe = folder / f"{uuid.uuid4().hex}.probe"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove(path: Path, owner: dict) -> None:
    """Removes a dead owner's lock file. If another process has replaced it meanwhile, the new one is put back."""
    doomed = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    if (_read(doomed) or {}).get("id") != owner.get("id"):
        with suppress(FileExistsError):
            os.link(doomed, path)
    doomed.unlink()
