"""A model repo on the Hugging Face Hub to write to: what it holds, uploads, commits, and clear errors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from run_ckpt.contract.errors import PublishError, UsageError
from run_ckpt.contract.manifest import Manifest
from run_ckpt.storage.hashing import add_file
from run_ckpt.storage.hub_client import hub_errors, make_client, new_git_blob_hash, page_of_repo
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.tools.publish.tool_url import checked_tool_url

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

# SGLang 0.5.23 (multimodal_gen/registry.py) hands such a --model-path to plain diffusers.
_MISREAD_NAME = re.compile(r"-(4bit|awq|gptq)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """Where to push to and how. ``revision`` is a branch, None for main; it is made where it does not exist.

    ``tool_url`` is where the card says the tool is, see tool_url.py. Raises UsageError for a name that
    can't be, or where the card would hold a placeholder.
    """

    repo_id: str
    revision: str | None = None
    private: bool = False
    commit_message: str | None = None
    overwrite: bool = False
    tool_url: str | None = None

    def __post_init__(self) -> None:
        if self.repo_id.count("/") != 1:
            raise UsageError(f"{self.repo_id}: not the name of a repo. Give owner/name.")
        if match := _MISREAD_NAME.search(self.repo_id):
            raise UsageError(
                f"{self.repo_id}: SGLang takes a model whose name contains {match[0]} for one that plain diffusers"
                " reads, which this is not. Choose another name."
            )
        checked_tool_url(self.tool_url)


@dataclass(frozen=True)
class LocalFile:
    """A file to push: ``name`` is its path in the repo, ``content`` where its bytes are, or they themselves."""

    name: str
    content: Path | bytes
    nbytes: int

    @cached_property
    def sha256(self) -> str:
        """What the Hub knows a large file by, hexadecimal; the file is read when this is first asked for."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        digest = hashlib.sha256()
        add_file(digest, self.content)
        return digest.hexdigest()


class Repository:
    """An open repo. ``files`` maps each path in it to (size, SHA-256 of an LFS file or None, git's blob id)."""

    def __init__(self, api: HfApi, target: Target):
        from huggingface_hub import RepoFile

        self._api = api
        self._target = target
        self._head = _find_head(api, target)
        self._staged: list[CommitOperationAdd] = []
        self.url = page_of_repo(target.repo_id)
        self.files = {
            entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
            for entry in api.list_repo_tree(target.repo_id, recursive=True, revision=self._head)
            if isinstance(entry, RepoFile)
        }

    def holds(self, file: LocalFile) -> bool:
        """True where the repo has this very file."""
        if file.name not in self.files:
            return False
        nbytes, sha256, blob_id = self.files[file.name]
        if nbytes != file.nbytes:
            return False
        return sha256 == file.sha256 if sha256 else blob_id == _git_blob_id(file)

    def read_manifest(self, name: str) -> Manifest:
        """Return the manifest at ``name`` in the repo. Raises PublishError, or ManifestError where it is damaged."""
        with TemporaryDirectory() as folder, hub_errors(self._target.repo_id, name, writes=True):
            path = self._api.hf_hub_download(self._target.repo_id, name, revision=self._head, local_dir=folder)
            return read_manifest(Path(path).parent)

    def stage(self, files: Iterable[LocalFile]) -> None:
        """Upload bytes; the repo does not show them until commit(). Bytes that the Hub has are not sent again."""
        operations = [_addition(file) for file in files]
        with hub_errors(self._target.repo_id, writes=True):
            self._api.preupload_lfs_files(
                self._target.repo_id, operations, revision=self._target.revision, free_memory=False
            )
        self._staged += operations

    def commit(self, files: Iterable[LocalFile], message: str, deleted: Iterable[str] = ()) -> None:
        """Make the repo show ``files`` and all staged ones, and ``deleted`` no longer, in one step."""
        from huggingface_hub import CommitOperationDelete

        self.stage(files)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*self._staged]
        operations += [CommitOperationDelete(name, is_folder=False) for name in deleted]
        with hub_errors(self._target.repo_id, writes=True):
            commit = self._api.create_commit(
                self._target.repo_id,
                operations,
                commit_message=message,
                revision=self._target.revision,
                parent_commit=self._head,
            )
        self._head = commit.oid
        self._staged.clear()


def open_repository(target: Target, *, show_bars: bool = True) -> Repository:
    """Return the repo, made where it does not exist. Raises PublishError, UsageError for a name that can't be.

    show_bars: let the client draw its progress bars, where standard error is a terminal.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not show_bars:
        disable_progress_bars()
    with hub_errors(target.repo_id, writes=True):
        return Repository(make_client(), target)


def _find_head(api: HfApi, target: Target) -> str | None:
    """Return the commit at the head of the branch; make repo and branch where they do not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo_id, revision = target.repo_id, target.revision
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=target.private or None)
        info = api.model_info(repo_id)
    api.auth_check(repo_id, write=True)
    if target.private and not info.private:
        raise PublishError(
            f"{repo_id}: exists and is public; --private holds for new repos. Make it private in its settings,"
            " or leave --private out."
        )
    if revision is None:
        return info.sha
    try:
        return api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        # From the first commit, so that the branch does not start with another result's files.
        first = api.list_repo_commits(repo_id)[-1].commit_id
        api.create_branch(repo_id, branch=revision, revision=first)
        return first


def _addition(file: LocalFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    content = file.content if isinstance(file.content, bytes) else str(file.content)
    return CommitOperationAdd(file.name, content)


def _git_blob_id(file: LocalFile) -> str:
    digest = new_git_blob_hash(file.nbytes)
    digest.update(file.content if isinstance(file.content, bytes) else file.content.read_bytes())
    return str(digest.hexdigest())
