"""Models from the hub, by `OWNER/NAME` or `OWNER/NAME@REVISION`.

`huggingface_hub` does the work: cache, resuming, tokens, mirrors (`HF_ENDPOINT`), offline mode. Here is what a
conversion needs of a model, and what is said when it cannot be had. Tokens stand in no message.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.errors import ModelError

Say = Callable[[str], None]
Advance = Callable[[int, int], None]

_WANTED = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja")
"""Config, weights, tokenizer. No PyTorch pickles, no weights for other frameworks, no pictures."""

_UNWANTED = ("*/*", "consolidated*", "adapter_model*")
"""The same weights again: in folders (original/, onnx/) and as the model's makers keep them; and what adapters hold."""

_ID = re.compile(r"[\w.-]+/[\w.-]+(@\S+)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MEGA = 1 << 20


def is_hub_id(model: str) -> bool:
    """Return whether this could name a model of the hub."""
    return _ID.fullmatch(model) is not None


@dataclass(frozen=True)
class Hub:
    """How models are downloaded.

    Attributes:
        token: of an account; None takes the environment's (HF_TOKEN), or the one that `hf auth login` keeps.
        advance: told of MiB there, and of all, while a model is downloaded.
    """

    token: str | None = field(default=None, repr=False)
    advance: Advance = lambda *_: None

    def fetch(self, model: str, say: Say = lambda _: None) -> Path:
        """Return the folder of a model, downloading what of it is not in the hub's cache.

        Args:
            model: its id, with a branch, a tag or a commit behind an @, or without.
            say: receives a line before the download.

        Raises:
            ModelError: it is not there, gated, of no such revision, not within reach, or larger than the disk's room.
        """
        repo, _, revision = model.partition("@")
        wanted = {"revision": revision or None, "allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
        try:
            return self._download(repo, wanted, say)
        except ModelError:
            raise
        except Exception as error:  # the hub client raises many unrelated kinds
            raise ModelError(_Asked(repo, revision, self.token).phrase(error)) from error

    def _download(self, repo: str, wanted: dict[str, Any], say: Say) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError

        wanted = wanted | {"repo_id": repo, "token": self.token}
        try:
            files = snapshot_download(**wanted, dry_run=True, tqdm_class=_bar(lambda _: None))
        except DryRunError:  # out of reach: perhaps it is in the cache
            return Path(snapshot_download(**wanted, tqdm_class=_bar(lambda _: None)))
        _check_files(repo, wanted["revision"], [f.filename for f in files], self.token)
        missing = sum(f.file_size or 0 for f in files if f.will_download)
        if missing:
            _check_room(repo, missing)
            say(f"Downloading {repo} from the hub ({_size(missing)})")
        counted = _Counter(missing, self.advance)
        return Path(snapshot_download(**wanted, tqdm_class=_bar(counted)))


DEFAULT_HUB = Hub()
"""With the environment's token, and nobody told."""


class _Counter:
    """Adds up what arrives."""

    def __init__(self, total: int, advance: Advance) -> None:
        self._done, self._total, self._advance = 0, total, advance

    def __call__(self, count: int) -> None:
        self._done += count
        if self._total:
            self._advance(min(self._done, self._total) // _MEGA, -(-self._total // _MEGA))


def _bar(told: Callable[[int], None]) -> type:
    """A class of bars for the hub client that shows nothing, and tells of the bytes of files that arrive."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # one bar counts what the network brings, another what is on disk of it
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                told(int(n or 0))

    return Bar


def _check_files(repo: str, revision: str | None, names: Iterable[str], token: str | None) -> None:
    """Refuse repositories that hold no model that can be read, before anything of them is downloaded."""
    names = set(names)
    if "adapter_config.json" in names or ("config.json" in names and any(n.endswith(".safetensors") for n in names)):
        return
    from huggingface_hub import HfApi

    every = HfApi(token=token).list_repo_files(repo, revision=revision)
    if files := sorted(name for name in every if name.endswith(".gguf")):
        raise ModelError(f"{repo} holds GGUF files alone, such as {files[0]}: download one and give its path")
    if files := sorted(name for name in every if name.endswith((".bin", ".pt", ".pth"))):
        raise ModelError(
            f"{repo} has its weights in PyTorch's pickles ({files[0]}), which are programs and are not read: "
            "take a revision with safetensors (often @refs/pr/1), or save it anew with safetensors"
        )
    missing = "config.json" if "config.json" not in names else "*.safetensors file"
    raise ModelError(f"{repo} has no {missing}: it holds no model that can be read")


def _check_room(repo: str, missing: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = next(f for f in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if f.is_dir())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ModelError(
            f"{repo} needs {_size(missing)}, and {_size(free)} are free in {folder}: make room, or let HF_HOME name a "
            "folder on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{-(-count // 1_000_000)} MB"


@dataclass(frozen=True)
class _Asked:
    """What was asked of the hub, for the words of a refusal."""

    repo: str
    revision: str
    token: str | None

    @property
    def page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo}"

    @property
    def refused(self) -> str:
        if self.revision and Path(self.repo).exists():
            return f"{self.repo} here has no revisions (leave @{self.revision} out), and the hub did not give it"
        return f"no folder {self.repo} here, and the hub did not give it"

    def has_token(self) -> bool:
        from huggingface_hub import get_token

        return bool(self.token or get_token())

    def phrase(self, error: Exception) -> str:
        """Say in one line why the hub's client did not give a model."""
        from huggingface_hub import errors

        causes = list(_causes(error))
        for names, says in self._known():
            kinds = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
            found = next((cause for cause in causes if isinstance(cause, kinds)), None)
            if found is not None:
                return says()
        if any(isinstance(cause, OSError) and cause.errno in _FULL for cause in causes):
            return self._full()
        answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
        if answer is not None and answer.response.status_code in (401, 403):
            return f"{self.repo}: the hub does not take this token. Give another: {_give()}"
        if answer is None and any(_is_of_transport(cause) for cause in causes):
            return self._out_of_reach()
        reason = (str(error).strip().splitlines() or [""])[0]
        text = f"{self.refused} ({type(error).__name__}: {reason})"
        return text.replace(self.token, "…") if self.token else text

    def _known(self) -> list[tuple[tuple[str, ...], Callable[[], str]]]:
        """Errors of the client and what is said of them, the more special before the more general."""
        return [
            (("GatedRepoError",), self._gated),
            (("RevisionNotFoundError",), self._no_revision),
            (("RepositoryNotFoundError",), self._no_model),
            (("OfflineModeIsEnabled",), self._offline),
        ]

    def _gated(self) -> str:
        todo = "with the account of the token" if self.has_token() else f"and give its token: {_give()}"
        return f"{self.repo} is gated: accept its conditions at {self.page} {todo}"

    def _no_revision(self) -> str:
        wanted = self.revision or "main"
        return f"{self.repo} has no revision {wanted}: its branches and tags stand at {self.page}/tree/main"

    def _no_model(self) -> str:
        private = "the token may not read it" if self.has_token() else f"it wants a token: {_give()}"
        return f"{self.refused}: there is no model of that name, or {private}"

    def _offline(self) -> str:
        return f"{self.refused}: it is not in the cache as a whole, and HF_HUB_OFFLINE forbids to download it"

    def _out_of_reach(self) -> str:
        server = self.page.removesuffix(f"/{self.repo}")
        return (
            f"{self.refused}: {server} cannot be reached, and it is not in the cache as a whole. Check the network, "
            "and run the same command again: it goes on where the download was"
        )

    def _full(self) -> str:
        from huggingface_hub import constants

        return (
            f"{self.repo}: the disk of {constants.HF_HUB_CACHE} is full. Make room and run the same command again, "
            "which goes on where the download was, or let HF_HOME name a folder on another disk"
        )


def _give() -> str:
    return f"{spelled('token')}, the environment's HF_TOKEN, or `hf auth login`"


def _is_of_transport(error: BaseException) -> bool:
    """Whether the HTTP client could not speak to the hub, by whichever name its package goes."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__name__ in ("TransportError", "LocalEntryNotFoundError") for kind in type(error).__mro__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
