"""A folder on the hub. `huggingface_hub` does the work; what went up before an interruption is not sent again.

Large files go up one by one, each whole or not at all, and one commit then makes all of them appear. The hub knows
files by their SHA-256: the same upload again sends what is missing. Tokens stand in no message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tesseraq_gguf.errors import PublishingError, UsageError

Watch = Callable[[str, int, int], None]
"""Told what is counted, how much of it is done, and of how much."""

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PREFIX = "hub:"


def read_target(target: str) -> str | None:
    """Return OWNER/NAME of a target on the hub; None if it is a folder.

    Raises:
        UsageError: it names no repository.
    """
    if not target.startswith(PREFIX):
        return None
    repo = target.removeprefix(PREFIX)
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError(f"{target} names no repository of the hub: it must be hub:OWNER/NAME")
    return repo


@dataclass(frozen=True)
class Hub:
    """Where to upload.

    Attributes:
        repo: OWNER/NAME; it is made if it is not there.
        token: of an account that may write; None takes the environment's (HF_TOKEN), or that of `hf auth login`.
        private: whether a repository that is made is private.
    """

    repo: str
    token: str | None = field(default=None, repr=False)
    private: bool = False

    def check(self) -> None:
        """Refuse before any work is done what would be refused after it.

        Raises:
            PublishingError: there is no token, or the hub does not take it or cannot be reached.
        """
        from huggingface_hub import get_token

        if not (self.token or get_token()):
            raise PublishingError(f"to upload to {self.repo} a token is needed that may write: {_GIVE}")
        self._ask(lambda api: api.whoami())

    def upload(self, folder: Path, watch: Watch = lambda *_: None) -> str:
        """Upload all files of a folder, and return the address of the commit.

        Raises:
            PublishingError: it did not succeed; the same upload again goes on where it was.
        """
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
        total, done = sum(op.upload_info.size for op in operations), 0
        self._ask(lambda api: api.create_repo(self.repo, private=self.private, exist_ok=True))
        for operation in operations:
            size = operation.upload_info.size
            self._ask(partial(_send, repo=self.repo, operation=operation))
            done += size
            watch("uploading MB", done // 1_000_000, total // 1_000_000)
        made = self._ask(lambda api: api.create_commit(self.repo, operations, commit_message=_message(operations)))
        return str(made.commit_url)

    def _ask(self, what: Callable[[Any], Any]) -> Any:
        from huggingface_hub import HfApi

        try:
            with _quiet():
                return what(HfApi(token=self.token))
        except Exception as error:  # the hub client raises many unrelated kinds
            said = self._phrase(error)
        raise PublishingError(said)  # outside the handler: requests, and their headers, hang on the errors

    def _phrase(self, error: BaseException) -> str:
        """Say in one line why the hub did not take it."""
        from huggingface_hub import errors

        causes = list(_causes(error))
        answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
        status = answer.response.status_code if answer is not None and answer.response is not None else 0
        again = "run the same command again: it goes on where it was"
        if status in (401, 403):
            return f"{self.repo}: the hub does not let this token write there. Give another: {_GIVE}"
        if status == 404:
            return f"{self.repo}: the hub has no such owner, or the token may not see it. Check the name"
        if status == 413 or status == 507:
            return f"{self.repo}: the hub has no room for it: make room in the account, and {again}"
        if status:
            return f"{self.repo}: the hub answered {status}: {again}"
        if any(_is_of_transport(cause) for cause in causes):
            return f"{self.repo}: the hub cannot be reached, or the connection broke. Check the network, and {again}"
        reason = (str(error).strip().splitlines() or [""])[0]
        return self._silenced(f"{self.repo}: the upload failed ({type(error).__name__}: {reason}): {again}")

    def _silenced(self, text: str) -> str:
        from huggingface_hub import get_token

        for secret in filter(None, (self.token, get_token())):
            text = text.replace(secret, "…")
        return re.sub(r"hf_\w{12,}", "…", text)


_GIVE = "--token, the environment's HF_TOKEN, or `hf auth login`"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client from showing bars of its own, and addresses that are signed."""
    import logging as levels

    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(levels.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


def _send(api: Any, repo: str, operation: Any) -> None:
    """Upload a file if it is a large one that the hub does not have."""
    api.preupload_lfs_files(repo, [operation])


def _message(operations: list[Any]) -> str:
    models = [op.path_in_repo for op in operations if op.path_in_repo.endswith(".gguf")]
    return f"Add {models[0]}" if len(models) == 1 else f"Add {len(models)} GGUF files"


def _is_of_transport(error: BaseException) -> bool:
    """Whether the HTTP client could not speak to the hub, by whichever name its package goes."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__name__ in ("TransportError", "OfflineModeIsEnabled") for kind in type(error).__mro__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
