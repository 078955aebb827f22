"""A store in a folder of a POSIX file system."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from restitch.merging.digests import digest_bytes, digest_file
from restitch.merging.errors import BadInput
from restitch.registry.store.base import Listed, NotInStore, Tagged, check_name, is_name
from restitch.registry.store.disk import explained, files_below, locked, sweep, sync, write_durably

# A name's parts never begin with a dot, so these folders can hold no object.
_TEMPORARY, _LOCKS = ".tmp", ".locks"
# The errors of a file system without links, and of two file systems.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class FolderStore:
    """A store in a folder: one file per object.

    Files that are being written lie in `.tmp`, lock files in `.locks`. Writers in other
    processes and on other mounts are safe as far as `link`, `rename` and `flock` are. The
    kernel releases a lock when its process dies.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.address = str(root)

    def put(self, name: str, data: bytes | Path, *, move: bool = False) -> bool:
        """Create the object durably; see `Store.put`."""
        target = self._path(name)
        if isinstance(data, Path) and not data.is_file():
            raise BadInput(f"the file {data} does not exist")
        with explained(target, "write"):
            if target.exists():
                # Its writer may not have synced the folder yet, and we promise durability.
                sync(target.parent)
                created = False
            else:
                self._make_folder(target.parent)
                created = self._create(target, data, move)
            if move and isinstance(data, Path):
                data.unlink(missing_ok=True)
        return created

    def read(self, name: str) -> bytes:
        """The object's bytes; see `Store.read`."""
        with self._reading(name) as path:
            return path.read_bytes()

    def read_tagged(self, name: str) -> Tagged:
        """The object's bytes with their digest; see `Store.read_tagged`."""
        data = self.read(name)
        return Tagged(data, digest_bytes(data))

    def swap(self, name: str, expected: str | None, data: bytes) -> str | None:
        """Replace the object if it is still the expected one; see `Store.swap`."""
        target = self._path(name)
        with explained(target, "write"), self._locked(name):
            try:
                present = digest_bytes(target.read_bytes())
            except FileNotFoundError:
                present = None
            if present != expected:
                return None
            self._replace(target, data)
        return digest_bytes(data)

    def local_path(self, name: str, *, fresh: bool = False) -> Path:
        """The object's own file; see `Store.local_path`."""
        path = self._path(name)
        with explained(path, "read"):
            if not path.is_file():
                raise NotInStore(name)
        return path

    def list(self, prefix: str = "") -> Iterator[str]:
        """The names below a prefix, sorted; see `Store.list`."""
        folder = self._path(prefix.rstrip("/")) if prefix else self.root
        with explained(folder, "list"):
            names = (str(path.relative_to(self.root)) for path in files_below(folder))
            return iter(sorted(filter(is_name, names)))

    def sweep(self, older_than: float) -> int:
        """Remove temporary files by age; see `Store.sweep`."""
        folder = self.root / _TEMPORARY
        with explained(folder, "sweep"):
            return sweep(files_below(folder), older_than)

    def details(self, prefix: str = "") -> Iterator[Listed]:
        """The objects below a prefix, sorted; see `Store.details`."""
        for name in self.list(prefix):
            path = self.root / name
            with explained(path, "read"):
                try:
                    status = path.stat()
                except FileNotFoundError:  # removed since it was listed
                    continue
            yield Listed(name, status.st_size, status.st_mtime)

    def exists(self, name: str) -> bool:
        """True if its file exists; see `Store.exists`."""
        path = self._path(name)
        with explained(path, "read"):
            return path.is_file()

    def digest(self, name: str) -> str:
        """The digest of its file; see `Store.digest`."""
        with self._reading(name) as path:
            return digest_file(path)

    def mend(self, name: str, data: bytes | Path) -> None:
        """Replace its file; see `Store.mend`."""
        target = self._path(name)
        with explained(target, "write"):
            self._replace(target, data)

    def remove(self, name: str) -> bool:
        """Remove its file; see `Store.remove`."""
        path = self._path(name)
        with explained(path, "remove"):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return False
            sync(path.parent)
        return True

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self._path(name)
        with explained(path, "read"):
            try:
                yield path
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotInStore(name) from None

    def _replace(self, target: Path, data: bytes | Path) -> None:
        self._make_folder(target.parent)
        with self._temporary() as temporary:
            write_durably(temporary, data)
            temporary.replace(target)
        sync(target.parent)

    def _create(self, target: Path, data: bytes | Path, move: bool) -> bool:
        created = None
        if move and isinstance(data, Path):
            sync(data)
            created = _link(data, target)
        if created is None:
            with self._temporary() as temporary:
                write_durably(temporary, data)
                created = _link(temporary, target)
                if created is None:
                    with self._locked("put"):
                        created = not target.exists()
                        if created:
                            temporary.rename(target)
        sync(target.parent)
        return created

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        self._make_folder(self.root / _TEMPORARY)
        path = self.root / _TEMPORARY / uuid.uuid4().hex
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self._make_folder(self.root / _LOCKS)
        with locked(self.root / _LOCKS / name.replace("/", ",")):
            yield

    def _make_folder(self, folder: Path) -> None:
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            sync(path.parent)


def _link(source: Path, target: Path) -> bool | None:
    """Give a file its name unless that exists, which `rename` would overwrite.

    Returns:
        None if the file system has no hard links, or source and target lie on two of them.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno in _NO_LINKS:
            return None
        raise
    return True
