"""Data sets and judges at pinned revisions: where they lie once fetched, and how they are fetched.

Files of the hub lie in its own cache; files of GitHub in HF_HOME/assess, checked against their SHA-256 at every read.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

GITHUB = "https://raw.githubusercontent.com"  # GITHUB_ENDPOINT names a mirror, as HF_ENDPOINT does for the hub


@dataclass(frozen=True)
class HubFiles:
    """Files of one revision on the hub."""

    repo: str
    revision: str
    patterns: tuple[str, ...]
    kind: str = "dataset"  # or model

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}"

    def find(self) -> Path:
        """The folder of the files in the cache. Errors: FileNotFoundError if they are not there."""
        try:
            folder = Path(
                snapshot_download(
                    self.repo, repo_type=self.kind, revision=self.revision, allow_patterns=list(self.patterns),
                    local_files_only=True,
                )
            )  # fmt: skip
        except (LocalEntryNotFoundError, HFValidationError, OSError):
            raise FileNotFoundError(self) from None
        if not any(True for pattern in self.patterns for _ in folder.glob(pattern)):
            raise FileNotFoundError(self)
        return folder

    def fetch(self) -> Path:
        """Downloads what is missing. Errors: ValueError, naming the remedy."""
        try:
            return Path(
                snapshot_download(
                    self.repo, repo_type=self.kind, revision=self.revision, allow_patterns=list(self.patterns)
                )
            )
        except GatedRepoError:
            raise ValueError(
                f"{self}: its owners ask you to agree to their terms: do so on its page, then `hf auth login`, and "
                "fetch again"
            ) from None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{self}: could not be fetched: {_first_line(error)}") from None


@dataclass(frozen=True)
class GitHubFile:
    """One file of one commit."""

    repo: str
    revision: str
    path: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}:{self.path}"

    @property
    def _place(self) -> Path:
        return Path(constants.HF_HOME) / "assess" / self.sha256[:12] / Path(self.path).name

    def find(self) -> Path:
        """The file. Errors: FileNotFoundError if it is not there, ValueError if it is another one."""
        if not self._place.is_file():
            raise FileNotFoundError(self)
        self._check(self._place.read_bytes())
        return self._place

    def fetch(self) -> Path:
        """Downloads the file if it is missing. Errors: ValueError, also for other contents than expected."""
        if not self._place.is_file():
            url = f"{os.environ.get('GITHUB_ENDPOINT', GITHUB)}/{self.repo}/{self.revision}/{self.path}"
            try:
                with urllib.request.urlopen(url, timeout=60) as response:
                    content: bytes = response.read()
            except OSError as error:
                raise ValueError(f"{self}: could not be fetched: {_first_line(error)}") from None
            self._check(content)
            self._place.parent.mkdir(parents=True, exist_ok=True)
            partial = self._place.with_name(f"{self._place.name}.{os.getpid()}.partial")
            partial.write_bytes(content)
            partial.replace(self._place)
        return self.find()

    def _check(self, content: bytes) -> None:
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{self}: has SHA-256 {found[:12]}..., expected {self.sha256[:12]}...; remove {self._place}"
            )


Source = HubFiles | GitHubFile


def data_file(source: Source, suite: str) -> Path:
    """The one file of a data set in the cache. Errors: ValueError naming the command that fetches it."""
    try:
        found = source.find()
    except FileNotFoundError:
        raise ValueError(
            f"--suites {suite}: {source} is not in the cache; run `python pipeline/assess.py fetch --suites {suite}` "
            f"where there is a network (same HF_HOME), or give --suite_data {suite}=FILE"
        ) from None
    if isinstance(source, GitHubFile):
        return found
    return sorted(each for pattern in source.patterns for each in found.glob(pattern))[0]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
