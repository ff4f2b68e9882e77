"""What a repository on the Hub holds, and the one commit that changes it.

Large files go up first and are not visible; the commit brings them and everything else at once, or nothing. What had to
be made for it (a repository, a branch) and stays when the upload fails is told with the error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_mae.exporting.telling import Say
from hf_mae.hub.stage import MANIFEST, File, Row, bytes_in_words, is_same, read_manifest
from hf_mae.patience import HTTP_ERROR, GaveUpError, explain, is_passing, patient, status_of

Remote = Mapping[str, RepoFile]


@dataclass(frozen=True)
class There:
    """What a repository holds before we write.

    Attributes:
        head: the commit; None if there is no repository, or it was not looked at.
        files: of that commit, by path.
        earlier: what an earlier publish wrote, `read_manifest`.
        has_branch: the branch exists; else head and files are those of main.
        looked: the Hub answered.
    """

    head: str | None
    files: Remote
    earlier: Mapping[str, Sequence[str]]
    has_branch: bool = True
    looked: bool = True


def check_token() -> bool:
    """Return whether there is a token.

    Raises:
        ValueError: it cannot be sent.
    """
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            "the token holds characters that no token has (a quotation mark of a text editor, a space, a line end); "
            "copy it again from https://huggingface.co/settings/tokens and log in with `hf auth login`, or mend "
            "HF_TOKEN"
        )
    return token is not None


def check_rights(api: HfApi, repo_id: str, *, create_pr: bool, say: Say) -> None:
    """Ask who the user is, and whether that is enough to write.

    Raises:
        ValueError: there is no token, it may only read, or the repository is of someone else.
    """
    page = "https://huggingface.co/settings/tokens"
    if not check_token():
        raise ValueError(
            f"publishing {repo_id} needs a token and there is none; make one with the role write at {page}, then log "
            "in with `hf auth login` or set HF_TOKEN"
        )
    me = patient("asking the Hub who you are", api.whoami, say=say)
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(
            f"publishing {repo_id}: the token of {me['name']} has the role read; make one with the role write at "
            f"{page}, then log in with `hf auth login`"
        )
    owner = repo_id.partition("/")[0]
    names = [me["name"], *(org["name"] for org in me.get("orgs") or ())]
    # A fine-grained token may write where it may not read who belongs to what.
    if not create_pr and role != "fineGrained" and owner.lower() not in {name.lower() for name in names}:
        raise ValueError(
            f"publishing {repo_id}: {owner} is not you ({me['name']}) nor an organisation of yours "
            f"({', '.join(names[1:]) or 'you have none'}); publish to {me['name']}/{repo_id.partition('/')[2]}, use a "
            f"token of a member of {owner} with the role write, or propose it with --create-pr"
        )


def look(api: HfApi, repo_id: str, revision: str | None, *, say: Say, may_fail: bool = False) -> There:
    """Read what is there.

    Args:
        api: the client.
        repo_id: the repository.
        revision: a branch; None is main.
        say: takes lines for the user.
        may_fail: a Hub that does not answer is no error, nor waited for longer than a second; for a dry run.
    """
    nothing, tries = There(None, {}, {}), 2 if may_fail else 6
    try:
        info = patient(
            f"looking at {repo_id}", lambda: api.model_info(repo_id, revision=revision), say=say, tries=tries
        )
    except RevisionNotFoundError:
        main = patient(f"looking at {repo_id}", lambda: api.model_info(repo_id), say=say)
        return replace(_read(api, repo_id, str(main.sha), say), has_branch=False)
    except RepositoryNotFoundError:
        return nothing
    except (OSError, HTTP_ERROR, GaveUpError) as error:
        if not may_fail or status_of(error) == 401:
            raise
        say(f"not compared with the Hub: {explain(error, repo_id=repo_id, what='looking')}")
        return replace(nothing, looked=False)
    return _read(api, repo_id, str(info.sha), say)


def _read(api: HfApi, repo_id: str, head: str, say: Say) -> There:
    remote = tree(api, repo_id, head, say)
    earlier = read_manifest(read_there(repo_id, MANIFEST, head, say).decode()) if MANIFEST in remote else {}
    return There(head, remote, earlier)


def read_there(repo_id: str, path: str, revision: str, say: Say | None = None) -> bytes:
    """Return the content of a small file of a repository."""
    return Path(
        patient(f"reading {path}", lambda: hf_hub_download(repo_id, path, revision=revision), say=say)
    ).read_bytes()


def tree(api: HfApi, repo_id: str, revision: str, say: Say | None = None) -> dict[str, RepoFile]:
    """Return the files of a commit by path."""

    def listed() -> dict[str, RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    return patient(f"listing {repo_id}", listed, say=say)


def differences(there: Remote, files: Sequence[File], rows: Sequence[Row]) -> list[str]:
    """Return the paths that are not in a commit as they were to be."""
    wrong = [f.path for f in files if f.path not in there or not is_same(there[f.path], [f.sha256, f.blob])]
    return wrong + [row.path for row in rows if row.state == "remove" and row.path in there]


def write(
    api: HfApi,
    repo_id: str,
    files: Sequence[File],
    rows: Sequence[Row],
    there: There,
    *,
    private: bool,
    create_pr: bool,
    revision: str | None,
    message: str,
    say: Say,
) -> tuple[str, str | None]:
    """Upload, then commit once.

    Returns:
        The commit (that of `there` if nothing is to be done) and the page of the pull request.

    Raises:
        ValueError, RuntimeError: it failed; with what was made before and stays.
    """
    made: list[str] = []
    state = {row.path: row.state for row in rows}
    adds = [CommitOperationAdd(f.path, str(f.local)) for f in files if state[f.path] != "same"]
    removals = [CommitOperationDelete(row.path) for row in rows if row.state == "remove"]
    with _telling(made, repo_id):
        parent = _make(api, repo_id, there, private=private, revision=revision, made=made, say=say)
        if not adds and not removals:
            say("everything is there already; nothing to commit")
            return parent, None
        size = sum(row.size for row in rows if row.state not in ("same", "remove"))
        say(f"uploading {len(adds)} files, {bytes_in_words(size)}")
        patient(
            f"uploading to {repo_id}",
            lambda: api.preupload_lfs_files(repo_id, adds, revision=revision, create_pr=create_pr, free_memory=False),
            say=say,
        )
        known = _pull_requests(api, repo_id) if create_pr else {}

        def landed() -> tuple[str, str | None] | None:
            """Look for our commit where the answer to it was lost: it may have been made."""
            if create_pr:
                fresh = {name: oid for name, oid in _pull_requests(api, repo_id).items() if name not in known}
                page = f"{api.endpoint}/{repo_id}/discussions/"
                found = [(oid, page + name.rpartition("/")[2]) for name, oid in fresh.items()]
            else:
                info = patient(f"looking at {repo_id}", lambda: api.model_info(repo_id, revision=revision), say=say)
                found = [(str(info.sha), None)]
            for oid, page in found:
                if oid != parent and not differences(tree(api, repo_id, oid), files, rows):
                    return oid, page
            return None

        def commit() -> tuple[str, str | None]:
            try:
                done = api.create_commit(
                    repo_id,
                    [*adds, *removals],
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
                return done.oid, done.pr_url
            except (OSError, HTTP_ERROR) as error:
                if (is_passing(error) or status_of(error) in (409, 412)) and (ours := landed()) is not None:
                    say("the Hub's answer to the commit was lost, but the commit is there")
                    return ours
                raise
            except ValueError as error:
                # The Hub's check of the card, which comes before the commit.
                if not re.match(r"Invalid metadata in README\.md", str(error)):
                    raise
                raise ValueError(
                    f"publishing {repo_id}: the Hub refuses the card: {' '.join(str(error).split())[:300]}; no file "
                    "was written"
                ) from error

        return patient(f"committing to {repo_id}", commit, say=say)


def _make(
    api: HfApi, repo_id: str, there: There, *, private: bool, revision: str | None, made: list[str], say: Say
) -> str:
    """Make the repository and the branch where they are missing; return the head of what is written to."""
    head, has_branch = there.head, there.has_branch
    if head is None:
        patient(f"making {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True), say=say)
        made.append(f"the new {'private' if private else 'public'} repository {repo_id} was made, and is empty")
        head = patient(f"looking at {repo_id}", lambda: str(api.model_info(repo_id).sha), say=say)
        has_branch = revision in (None, "main")
    if not has_branch:
        branch, start = str(revision), head
        patient(
            f"making branch {branch}",
            lambda: api.create_branch(repo_id, branch=branch, revision=start, exist_ok=True),
            say=say,
        )
        made.append(f"the new branch {branch} was made, and holds what main held ({head[:10]})")
    return head


@contextmanager
def _telling(made: Sequence[str], repo_id: str) -> Iterator[None]:
    """Add to an error what was made before it and stays."""
    try:
        yield
    except (OSError, HTTP_ERROR, RuntimeError, ValueError) as error:
        if not made:
            raise
        known = isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, HTTP_ERROR)
        told = error if known else explain(error, repo_id=repo_id, what=f"publishing {repo_id}")
        kind = type(told) if type(told) in (ValueError, RuntimeError, GaveUpError) else RuntimeError
        raise kind(f"{told}; before that, {' and '.join(made)}") from error


def _pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    refs = patient(
        f"listing pull requests of {repo_id}", lambda: api.list_repo_refs(repo_id, include_pull_requests=True)
    )
    return {pull.ref: pull.target_commit for pull in refs.pull_requests or []}
