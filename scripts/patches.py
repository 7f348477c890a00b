"""Patches as commits, and commits as patches; see scripts/patches."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tesseraq_gguf.runtime import cache
from tesseraq_gguf.runtime.progress import SilentReporter
from tesseraq_gguf.runtime.source import KERNELS, _extract, fetch_sdist

BASE = "base"
"""Tag of the commit that the patches are made for."""

DIFF = ("diff", "--abbrev=10", "--no-color", "--no-ext-diff", "--no-renames", "--diff-algorithm=myers", "--unified=3")


class PatchError(Exception):
    """What a user has to mend, in one message."""


def git(tree: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run git in a tree, whatever the user and the machine have configured."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    settings = {"user.name": "patches", "user.email": "patches@localhost", "core.autocrlf": "false"}
    options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
    command = ["git", *options, *arguments]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True)
    if check and result.returncode:
        message = (result.stderr or result.stdout).decode(errors="replace").strip()
        raise PatchError(f"git {arguments[0]} failed in {tree}: {message}")
    return result


def commits(tree: Path) -> list[str]:
    """The commits after the base, oldest first."""
    return git(tree, "rev-list", "--reverse", f"{BASE}..HEAD").stdout.decode().split()


def unpack(tree: Path, patches: Sequence[Path]) -> None:
    """Make a repository of the pinned llama.cpp with a commit for every patch, or go on in one that stopped.

    Raises:
        PatchError: a patch does not apply; what does is in the tree, and the rest in `*.rej`.
    """
    if not (tree / ".git").is_dir():
        _make_base(tree)
    elif git(tree, "status", "--porcelain").stdout:
        done = len(commits(tree))
        if done == len(patches):
            raise PatchError(f"all patches are commits in {tree} already; commit your changes")
        _commit(tree, patches[done])
    for patch in patches[len(commits(tree)) :]:
        if git(tree, "apply", "--whitespace=nowarn", str(patch.resolve()), check=False).returncode:
            git(tree, "apply", "--whitespace=nowarn", "--reject", str(patch.resolve()), check=False)
            raise PatchError(f"{patch.name} does not apply: mend what is in *.rej of {tree}, then unpack again")
        _commit(tree, patch)


def write(tree: Path, folder: Path) -> list[Path]:
    """Write the commits of a tree as the patch series of a folder, in place of what is there.

    Raises:
        PatchError: something is not committed, or a commit's subject is no `name: purpose`.
    """
    if git(tree, "status", "--porcelain").stdout:
        raise PatchError(f"{tree} has changes that are in no commit")
    series: dict[Path, bytes] = {}
    for number, commit in enumerate(commits(tree), 1):
        subject = git(tree, "log", "-1", "--format=%s", commit).stdout.decode().strip()
        name, colon, _ = subject.partition(":")
        if not colon or not name or not name.replace("-", "").isalnum():
            raise PatchError(f"the subject of {commit[:10]} is '{subject}', not 'name: what it is for'")
        diff = git(tree, *DIFF, f"{commit}~", commit).stdout
        series[folder / f"{number:04d}-{name}.patch"] = f"{subject}\n\n".encode() + diff
    folder.mkdir(parents=True, exist_ok=True)
    for old in set(folder.glob("*.patch")) - set(series):
        old.unlink()
    for path, content in series.items():
        path.write_bytes(content)
    return list(series)


def _make_base(tree: Path) -> None:
    if tree.exists() and any(tree.iterdir()):
        raise PatchError(f"{tree} is not empty")
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
        _extract(fetch_sdist(), Path(temporary), with_llama_cpp=True, progress=SilentReporter())
        if tree.exists():
            tree.rmdir()
        (Path(temporary) / "llama.cpp").rename(tree)
    for ignored in tree.rglob(".gitignore"):  # upstream's: patches may touch what it names
        ignored.unlink()
    git(tree, "init", "--quiet", "--initial-branch=patches")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "the pinned llama.cpp")
    git(tree, "tag", BASE)
    # so that the tree can be built as it is
    (tree / KERNELS).symlink_to(cache.kernels_dir().resolve(), target_is_directory=True)
    (tree / ".git" / "info").mkdir(exist_ok=True)
    with (tree / ".git" / "info" / "exclude").open("a") as file:
        print(f"/{KERNELS.as_posix()}", "/build*", "__pycache__", sep="\n", file=file)


def _commit(tree: Path, patch: Path) -> None:
    if any(tree.rglob("*.rej")):
        raise PatchError(f"there are *.rej in {tree}: mend what they say and delete them, then unpack again")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", patch.read_text().splitlines()[0])


def main() -> None:
    """Unpack or write, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["unpack", "write"])
    parser.add_argument("tree", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.what == "unpack":
            unpack(arguments.tree, cache.patch_files())
            print(f"{len(commits(arguments.tree))} patches are commits in {arguments.tree}")
        else:
            written = write(arguments.tree, cache.kernels_dir() / "patches")
            print(f"{len(written)} patches written")
    except PatchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
