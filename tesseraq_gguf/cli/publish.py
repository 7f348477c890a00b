"""The command that publishes files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tesseraq_gguf.arguments import secret
from tesseraq_gguf.cli.output import bar, going_on, print_json, size
from tesseraq_gguf.cli.parameters import Json, of_fields, takes
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.printing import printable

if TYPE_CHECKING:
    from tesseraq_gguf.publishing.folder import Plan, Request
    from tesseraq_gguf.publishing.upload import Hub

_FILE = "FILE"


@dataclass(frozen=True)
class Asked:
    """What to publish and where, as the command line takes it."""

    words: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES… DIR|hub:OWNER/NAME",
            help="GGUF files of one model, anybody's, and a new folder, or a repository on the hub.",
        ),
    ]
    name: Annotated[
        str | None, typer.Option(help="What names begin with.", show_default="what the first file says of itself")
    ] = None
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="FILE=TAG", help="What programs find a file by, in place of its type."),
    ] = None
    base: Annotated[str | None, typer.Option("--base", metavar="OWNER/NAME", help="The original model on the hub.")] = (
        None
    )
    by: Annotated[str | None, typer.Option(help="Who quantised them.", show_default="OWNER of the hub")] = None
    url: Annotated[str | None, typer.Option(help="Where they are described.", show_default="the page on the hub")] = (
        None
    )
    license: Annotated[
        str | None, typer.Option(help="The original's licence, as the hub names it.", show_default="the files' own")
    ] = None
    comparison: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="What compare --json printed of the files: figures of the card."),
    ] = None
    imatrix: Annotated[
        Path | None, typer.Option(metavar=_FILE, help="The importance matrix that they were made with.")
    ] = None
    types: Annotated[
        list[Path] | None, typer.Option("--types", metavar=_FILE, help="OUT.types of a file; may be given often.")
    ] = None
    split: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Write parts of so many bytes at most where a file is larger.")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False
    token: Annotated[
        str | None,
        typer.Option(
            help="Token of the hub that may write.",
            show_default="HF_TOKEN of the environment, or the one of hf auth login",
        ),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be published; write nothing.")] = False

    def request(self, repo: str | None) -> Request:
        """Return what to publish."""
        from tesseraq_gguf.publishing.folder import Request
        from tesseraq_gguf.recipe.rules import size_of

        if self.base and self.base.count("/") != 1:
            raise UsageError(f"--base {self.base} must be OWNER/NAME, as on the hub")
        return Request(
            tuple(map(Path, self.words[:-1])),
            repo,
            self.name,
            dict(map(_tag, self.tag or ())),
            self.base,
            self.by,
            self.url,
            self.license,
            self.comparison,
            self.imatrix,
            tuple(self.types or ()),
            None if self.split is None else size_of(self.split),
        )

    def hub(self, repo: str | None) -> Hub | None:
        """Return where to upload; None if nothing is uploaded."""
        from tesseraq_gguf.publishing.upload import Hub

        if repo is None:
            for option, given in (("--token", self.token), ("--private", self.private)):
                if given:
                    raise UsageError(f"{option} has a meaning with hub:OWNER/NAME only")
            return None
        return Hub(repo, None if self.token is None else secret("token", self.token), self.private)


@takes(of_fields(Asked))
def publish(_: typer.Context, as_json: Json = False, **options: Any) -> None:
    """Publish GGUF files: under the names that programs look for, with a card, in a folder or on the hub.

    The files are copied, with what they say of themselves made complete, and the copies compared with them bit for bit.
    Beside them come README.md with what compare measured, the recipe, a Modelfile for Ollama, and checksums. An upload
    that was interrupted goes on with the same command.

    \b
    Examples:
      tesseraq-gguf publish out.gguf theirs.gguf my-model-GGUF --base OWNER/NAME --comparison compare.json
      tesseraq-gguf publish out.gguf hub:me/my-model-GGUF --base OWNER/NAME --split 4G
      tesseraq-gguf publish out.gguf hub:me/my-model-GGUF --dry-run
    """
    from tesseraq_gguf.publishing import folder
    from tesseraq_gguf.publishing.upload import read_target

    asked = Asked(**options)
    if len(asked.words) < 2:
        raise UsageError("nothing to publish: give GGUF files, and behind them a new folder or hub:OWNER/NAME")
    repo = read_target(asked.words[-1])
    if repo is None and asked.words[-1].endswith(".gguf"):
        raise UsageError(f"{asked.words[-1]} must be a new folder, or hub:OWNER/NAME: where to publish comes last")
    hub, request = asked.hub(repo), asked.request(repo)
    found = folder.plan(request)
    told = _plan(found, asked.words[-1])
    if asked.dry_run:
        if repo is None:
            folder.check_folder(Path(asked.words[-1]), found.size)
        print_json(told) if as_json else _print_plan(found)
        return
    if hub is None:
        with bar() as watch:
            folder.write(found, Path(asked.words[-1]), watch)
    else:
        told["commit"] = _upload(found, hub)
    if as_json:
        print_json(told)
        return
    _print_plan(found)
    print(f"Published: {told.get('commit', asked.words[-1])}")


def _upload(found: Plan, hub: Hub) -> str:
    """Write the folder where an interrupted run finds it again, and upload it; return the address of the commit."""
    from tesseraq_gguf.paths import cache_folder
    from tesseraq_gguf.publishing import folder

    hub.check()
    place = cache_folder("publish") / f"{hub.repo.replace('/', '--')}-{_identity(found)}"
    with going_on(), bar() as watch:
        if not place.exists():
            folder.write(found, place, watch)
        address = hub.upload(place, watch)
    shutil.rmtree(place)
    return address


def _identity(found: Plan) -> str:
    """What decides the bytes of a folder: what was asked for, and the files as they are now."""
    from tesseraq_gguf import __version__

    request = found.request
    beside = filter(None, (request.comparison, request.imatrix, *request.types))
    files = [part for file in found.files for part in file.source.parts]
    states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, *beside)]
    return hashlib.sha256(repr((request, states, __version__)).encode()).hexdigest()[:12]


def _tag(given: str) -> tuple[str, str]:
    file, mark, tag = given.rpartition("=")
    if not mark or not file:
        raise UsageError(f"--tag {given} must be FILE=TAG, such as theirs.gguf=Q2_K_THEIRS")
    return Path(file).name, tag


def _plan(found: Plan, target: str) -> dict[str, Any]:
    files = [
        {"source": str(f.source.path), "names": list(f.names), "tag": f.tag, "bytes": f.source.bytes, "sets": f.changed}
        for f in found.files
    ]
    return {"target": target, "files": files, "beside": [n for n in found.names if not _of_model(n, found.files)]}


def _of_model(name: str, files: Sequence[Any]) -> bool:
    return any(name in file.names for file in files)


def _print_plan(found: Plan) -> None:
    for file in found.files:
        named = file.names[0] + (f", the first of {len(file.names)} parts" if len(file.names) > 1 else "")
        print(printable(f"{file.source.path} -> {named}, {size(file.source.bytes)}"))
        if file.changed:
            print(f"  sets {', '.join(file.changed)}")
    print("beside: " + ", ".join(name for name in found.names if not _of_model(name, found.files)))
    for missing, option in ((found.license, "--license"), (found.model, "--base"), (found.measured, "--comparison")):
        if not missing:
            print(f"not known, and not on the card: {option} would say it")
