"""`hf-mae publish`: from a run to a repository on the Hub that works, in one commit.

    export (compared with the model) -> card (from the records) -> checks (card, widget, usage lines, all executed)
    -> table of what changes -> upload -> one commit -> read back, run again from there, verdict

Nothing is written to the Hub before every check has passed; a dry run ends there. Large files go up first and are not
visible; the commit brings them, the card and everything else at once, or nothing. A publish that was killed is run
again: what had arrived is not sent twice.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    metadata_load,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_mae.cards.options import CardOptions
from hf_mae.cards.usage import run_usage
from hf_mae.cards.validate import validate_card
from hf_mae.cards.write import write_card
from hf_mae.exporting.write import RECORD, Target, export
from hf_mae.hub.stage import (
    MANIFEST,
    File,
    Row,
    bytes_in_words,
    collect,
    collect_checkpoint,
    compare,
    describe,
    is_same,
    manifest_of,
    read_file,
    read_manifest,
)
from hf_mae.hub.widget import Verdict, check_folder, check_remote
from hf_mae.patience import HTTP_ERROR, GaveUpError, explain, is_passing, patient, status_of

Say = Callable[[str], None]
Remote = Mapping[str, RepoFile]


@dataclass(frozen=True)
class Published:
    """What a publish did.

    Attributes:
        url: the page of the repository.
        commit: the full name of the commit; empty after a dry run.
        pull_request: its page, if one was opened.
        verdict: on the widget; of the folder after a dry run, else of the Hub's answer.
        files: what happened to each path.
    """

    url: str
    commit: str
    pull_request: str | None
    verdict: Verdict
    files: list[Row]


@dataclass(frozen=True)
class _There:
    """What a repository holds before we write: no head if it does not exist, or was not asked."""

    head: str | None
    files: Remote
    earlier: Mapping[str, Sequence[str]]
    has_branch: bool = True


def publish(
    source: str | Path,
    repo_id: str,
    *,
    target: Target = "auto",
    weights: Literal["last", "best", "average"] = "last",
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    checkpoint: bool = False,
    code: bool = False,
    card: CardOptions | None = None,
    evaluations: Sequence[Path] = (),
    message: str | None = None,
    say: Say | None = None,
) -> Published:
    """Put a run or an export on the Hub, and prove that what arrived works.

    Args:
        source: a run folder (exported to RUN/export first), an export folder, or a model folder.
        repo_id: ORG/NAME; made if it does not exist.
        target: as for `hf_mae.export`; of a run or a model folder.
        weights: as for `hf_mae.export`.
        private: make a new repository private.
        create_pr: open a pull request.
        revision: a branch, made if it does not exist; None is main.
        dry_run: end after the checks and the table; nothing is written to the Hub.
        checkpoint: add the run's newest checkpoint under run/, for `hf_mae.hub.pull`.
        code: as for `hf_mae.export`.
        card: what the records do not say.
        evaluations: folders of `hf-mae evaluate --out` for the card.
        message: of the commit.
        say: called with lines for the user; None drops them.

    Raises:
        ValueError: something can be mended before anything is written: the token, the name, the card, the export.
        RuntimeError: the Hub or the network failed; says whether anything was written.
    """
    say, card, source = say or _quiet, card or CardOptions(), Path(source).expanduser()
    _check_arguments(source, repo_id, checkpoint, create_pr, revision)
    api, what = HfApi(library_name="hf_mae"), f"publishing {repo_id}"
    if not dry_run:
        with _explained(repo_id, what):
            _check_token(api, repo_id)
    with ExitStack() as cleanup:
        run, folder = _export(source, target, weights, code, card, cleanup, say)
        text = write_card(folder, repo_id, card, run=run, evaluations=evaluations).read_text(encoding="utf-8")
        verdict = _check(folder, repo_id, text, card, say)
        files = collect(folder) + (collect_checkpoint(run) if checkpoint and run is not None else [])
        with _explained(repo_id, what):
            there = _look(api, repo_id, revision, say, dry_run)
        listed = Path(cleanup.enter_context(tempfile.TemporaryDirectory())) / "files.json"
        listed.write_text(manifest_of(files, there.earlier))
        files.append(read_file(listed, MANIFEST))
        rows = compare(files, there.files, there.earlier)
        for line in _announce(repo_id, there, rows, folder, revision, private, create_pr, checkpoint):
            say(line)
        url = f"{api.endpoint}/{repo_id}"
        if dry_run:
            _say_verdict(verdict, say)
            say("dry run: nothing was written to the Hub")
            return Published(url, "", None, verdict, rows)
        message = message or _message(folder)
        with _explained(repo_id, what):
            commit, pull_request = _write(
                api, repo_id, files, rows, there, private=private, create_pr=create_pr, revision=revision,
                message=message, say=say,
            )  # fmt: skip
            _read_back(api, repo_id, commit, files, rows)
            verdict = _judge(api, repo_id, commit)
        say(f"published: {pull_request or url} ({commit[:10]})")
        _try_there(text, repo_id, card, on_main=pull_request is None and revision in (None, "main"), say=say)
        _say_verdict(verdict, say)
        return Published(url, commit, pull_request, verdict, rows)


def _quiet(line: str) -> None:
    del line


@contextmanager
def _explained(repo_id: str, what: str) -> Iterator[None]:
    """Turn errors of the client into sentences."""
    try:
        yield
    except GaveUpError:
        raise
    except (OSError, HTTP_ERROR) as error:
        raise explain(error, repo_id=repo_id, what=what) from error


# ------------------------------------------------------------------------------------------------ before any request


def _check_arguments(source: Path, repo_id: str, checkpoint: bool, create_pr: bool, revision: str | None) -> None:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name a run folder, an export or a model folder")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id):
        raise ValueError(f"repo_id={repo_id!r} is not of the form ORG/NAME; name the repository it will be")
    if checkpoint and not (source / "checkpoints").is_dir():
        raise ValueError(f"checkpoint=True and {source} is no run folder; only a run can be continued elsewhere")
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"create_pr=True with revision={revision!r}: a pull request is against main; leave one out")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision={revision!r} is a commit, which never changes; name a branch")


def _check_token(api: HfApi, repo_id: str) -> None:
    if get_token() is None:
        raise ValueError(
            f"publishing {repo_id} needs a token and there is none; make one with the role write at "
            "https://huggingface.co/settings/tokens, then log in with `hf auth login` or set HF_TOKEN"
        )
    me = patient("asking the Hub who you are", api.whoami)
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(
            f"publishing {repo_id}: the token of {me['name']} has the role read; make one with the role write at "
            "https://huggingface.co/settings/tokens, then log in with `hf auth login`"
        )


def _export(
    source: Path, target: Target, weights: Any, code: bool, card: CardOptions, cleanup: ExitStack, say: Say
) -> tuple[Path | None, Path]:
    """Return the run folder, if there is one, and the export folder, which is made if need be."""
    picture = card.samples[0] if card.samples else None
    if (source / "checkpoints").is_dir():
        return source, export(source, None, target, weights=weights, picture=picture, code=code, say=say)
    if (source / RECORD).is_file():
        above = source.absolute().parent.parent
        return (above if (above / "recipe.json").is_file() else None), source
    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory())) / source.absolute().name
    return None, export(source, folder, target, weights=weights, picture=picture, code=code, say=say)


def _check(folder: Path, repo_id: str, text: str, card: CardOptions, say: Say) -> Verdict:
    """Run everything that can be run before the upload. The outcome of the usage lines goes into the records."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if problems := validate_card(text, files=names):
        raise ValueError(f"the card of {repo_id} would not do: {'; '.join(problems)}")
    picture = card.samples[0] if card.samples else None
    verdict = check_folder(folder, picture=picture)
    if verdict.problems:
        found = "; ".join(f"{c.name}: {c.found} ({c.remedy})" for c in verdict.problems)
        raise ValueError(f"{folder} is not ready to be published: {found}")
    usage = run_usage(text, folder, repo_id, picture=picture)
    (folder / "records").mkdir(exist_ok=True)
    (folder / "records" / "usage.json").write_text(json.dumps(usage, indent=1) + "\n")
    say(f"the card's {len(usage['blocks'])} usage examples ran")
    return verdict


def _message(folder: Path) -> str:
    record = json.loads((folder / RECORD).read_text())
    return f"Publish {record.get('class', 'model')} of {record.get('source', {}).get('name', folder.name)} with hf_mae"


def _say_verdict(verdict: Verdict, say: Say) -> None:
    for line in verdict.lines():
        say(line)


# ------------------------------------------------------------------------------------------------ the repository


def _look(api: HfApi, repo_id: str, revision: str | None, say: Say, dry_run: bool) -> _There:
    """Read what is there; only a dry run goes on without an answer."""
    nothing = _There(None, {}, {})
    try:
        info = patient(f"looking at {repo_id}", lambda: api.model_info(repo_id, revision=revision), say=say)
    except RevisionNotFoundError:
        main = patient(f"looking at {repo_id}", lambda: api.model_info(repo_id), say=say)
        there = _read(api, repo_id, str(main.sha), say)
        return _There(there.head, there.files, there.earlier, has_branch=False)
    except RepositoryNotFoundError:
        return nothing
    except (OSError, HTTP_ERROR, GaveUpError) as error:
        if not dry_run or status_of(error) == 401:
            raise
        say(f"not compared with the Hub: {explain(error, repo_id=repo_id, what='looking')}")
        return nothing
    return _read(api, repo_id, str(info.sha), say)


def _read(api: HfApi, repo_id: str, head: str, say: Say) -> _There:
    remote = _tree(api, repo_id, head, say)
    earlier: dict[str, list[str]] = {}
    if MANIFEST in remote:
        path = patient(f"reading {MANIFEST}", lambda: hf_hub_download(repo_id, MANIFEST, revision=head), say=say)
        earlier = read_manifest(Path(path).read_text())
    return _There(head, remote, earlier)


def _tree(api: HfApi, repo_id: str, revision: str, say: Say = _quiet) -> dict[str, RepoFile]:
    def listed() -> dict[str, RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    return patient(f"listing {repo_id}", listed, say=say)


def _announce(
    repo_id: str,
    there: _There,
    rows: Sequence[Row],
    folder: Path,
    revision: str | None,
    private: bool,
    create_pr: bool,
    checkpoint: bool,
) -> Iterator[str]:
    where = "a pull request" if create_pr else f"branch {revision or 'main'}"
    where += "" if there.has_branch else " (new)"
    seen = ", which exists" if there.head else f", new and {'private' if private else 'public'}"
    license_id = (metadata_load(folder / "README.md") or {}).get("license", "none")
    yield f"{repo_id}{seen}: {where}, licence {license_id}"
    if there.head and private:
        yield "  private is for new repositories; who sees this one is set on its page"
    yield from describe(rows)
    if checkpoint:
        size = sum(row.size for row in rows if row.path.startswith("run/"))
        yield (
            f"  run/ ({bytes_in_words(size)}) continues the run elsewhere; its recipe and environment name paths and "
            "processes of this machine"
        )


def _write(
    api: HfApi,
    repo_id: str,
    files: Sequence[File],
    rows: Sequence[Row],
    there: _There,
    *,
    private: bool,
    create_pr: bool,
    revision: str | None,
    message: str,
    say: Say,
) -> tuple[str, str | None]:
    """Upload, then commit once. Return the commit and the page of the pull request."""
    if there.head is None:
        patient(f"making {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True), say=say)
        head = patient(f"looking at {repo_id}", lambda: str(api.model_info(repo_id).sha), say=say)
        there = _There(head, {}, {}, has_branch=revision in (None, "main"))
    if not there.has_branch:
        branch = str(revision)
        patient(f"making branch {branch}", lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), say=say)
    assert there.head is not None
    state = {row.path: row.state for row in rows}
    adds = [CommitOperationAdd(f.path, str(f.local)) for f in files if state[f.path] != "same"]
    removals = [CommitOperationDelete(row.path) for row in rows if row.state == "remove"]
    if not adds and not removals:
        say("everything is there already; nothing to commit")
        return there.head, None
    patient(
        f"uploading to {repo_id}",
        lambda: api.preupload_lfs_files(repo_id, adds, revision=revision, create_pr=create_pr, free_memory=False),
        say=say,
    )
    known = _pull_requests(api, repo_id) if create_pr else {}
    parent = there.head

    def landed() -> tuple[str, str | None] | None:
        """Look for our commit where the answer to it was lost: it may have been made."""
        if create_pr:
            fresh = {name: oid for name, oid in _pull_requests(api, repo_id).items() if name not in known}
            found = [
                (oid, f"{api.endpoint}/{repo_id}/discussions/{name.rpartition('/')[2]}") for name, oid in fresh.items()
            ]
        else:
            found = [
                (patient(f"looking at {repo_id}", lambda: str(api.model_info(repo_id, revision=revision).sha)), None)
            ]
        for oid, page in found:
            if oid != parent and not _differences(_tree(api, repo_id, oid), files, rows):
                return oid, page
        return None

    def commit() -> tuple[str, str | None]:
        try:
            made = api.create_commit(
                repo_id,
                [*adds, *removals],
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return made.oid, made.pr_url
        except (OSError, HTTP_ERROR) as error:
            if (is_passing(error) or status_of(error) in (409, 412)) and (ours := landed()) is not None:
                say("the Hub's answer to the commit was lost, but the commit is there")
                return ours
            raise
        except ValueError as error:  # the Hub's check of the card, which comes before the commit
            raise ValueError(
                f"publishing {repo_id}: the Hub refuses the card: {' '.join(str(error).split())[:300]}; nothing was "
                "written"
            ) from error

    return patient(f"committing to {repo_id}", commit, say=say)


def _pull_requests(api: HfApi, repo_id: str) -> dict[str, str]:
    refs = patient(
        f"listing pull requests of {repo_id}", lambda: api.list_repo_refs(repo_id, include_pull_requests=True)
    )
    return {pull.ref: pull.target_commit for pull in refs.pull_requests or []}


# ------------------------------------------------------------------------------------------------ afterwards


def _differences(there: Remote, files: Sequence[File], rows: Sequence[Row]) -> list[str]:
    wrong = [f.path for f in files if f.path not in there or not is_same(there[f.path], [f.sha256, f.blob])]
    return wrong + [row.path for row in rows if row.state == "remove" and row.path in there]


def _read_back(api: HfApi, repo_id: str, commit: str, files: Sequence[File], rows: Sequence[Row]) -> None:
    if wrong := _differences(_tree(api, repo_id, commit), files, rows):
        raise RuntimeError(
            f"{repo_id} at {commit} is not what was sent: {', '.join(wrong[:5])} differ; run the same command again, "
            "and look at the repository's page if it happens twice"
        )


def _judge(api: HfApi, repo_id: str, commit: str) -> Verdict:
    def ask() -> dict[str, Any]:
        # ModelInfo leaves out what the page decides by, so the answer is read as it is.
        answer = get_session().get(f"{api.endpoint}/api/models/{repo_id}/revision/{commit}", headers=build_hf_headers())
        hf_raise_for_status(answer)
        return answer.json()

    return check_remote(patient(f"reading {repo_id}", ask))


def _try_there(text: str, repo_id: str, card: CardOptions, *, on_main: bool, say: Say) -> None:
    """Run the usage lines as a stranger would, from the Hub and with an empty cache."""
    if not on_main:
        say("the usage lines read the branch main, so they were run on the folder only")
        return
    picture = card.samples[0] if card.samples else None
    try:
        # A client in a process of its own does not wait as we do, and it is new each time.
        patient(
            "running the usage lines",
            lambda: run_usage(text, None, repo_id, picture=picture),
            tries=3,
            say=say,
            passing=lambda error: isinstance(error, RuntimeError),
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{repo_id} is published and whole, but the lines of its card did not run from there: {error}"
        ) from error
    say("the usage examples ran from the Hub, with an empty cache")
