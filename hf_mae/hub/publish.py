"""`hf-mae publish`: from a run to a repository on the Hub that works, in one commit.

    export (compared with the model) -> card (from the records) -> checks (card, widget, usage lines, all executed)
    -> table of what changes -> upload -> one commit -> read back, run again from there, verdict

Nothing is written to the Hub before every check has passed; a dry run ends there. Large files go up first and are not
visible; the commit brings them, the card and everything else at once, or nothing. A publish that was killed is run
again: files that had arrived are not sent twice, unless by xet, which finds again only what a finished session sent.
What is sent is a copy, so a run may go on meanwhile.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_mae.cards.options import CardOptions
from hf_mae.cards.usage import run_usage, usage_blocks
from hf_mae.cards.validate import validate_card
from hf_mae.cards.write import USAGE, write_card
from hf_mae.exporting.folders import WouldOverwriteError, is_edited, shown, write_files
from hf_mae.exporting.telling import Say, silent
from hf_mae.exporting.write import RECORD, Target, export
from hf_mae.hub.repository import There, check_rights, check_token, differences, look, read_there, tree, write
from hf_mae.hub.stage import (
    MANIFEST,
    File,
    Named,
    Row,
    bytes_in_words,
    clashes,
    collect,
    collect_checkpoint,
    compare,
    describe,
    keep_times,
    manifest_of,
    read_file,
    take,
)
from hf_mae.hub.widget import Verdict, check_folder, check_remote
from hf_mae.patience import HTTP_ERROR, GaveUpError, explain, patient
from hf_mae.training.checkpoint import RunLock

PASSING = re.compile(
    r"\b(429|5\d\d) (Client Error|Server Error|Too Many|Internal|Bad Gateway|Service Unavailable|Gateway Time)"
    r"|Connect(ion)?(Error|Timeout|ResetError|RefusedError)|(Read|Write|Pool)(Timeout|Error)|RemoteProtocolError"
    r"|couldn't connect to|LocalEntryNotFoundError|[Tt]imed out|Connection (reset|refused|aborted)"
)
"""What the last lines of a client say when the network failed it, and not the card."""


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
    overwrite_edits: bool = False,
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
        overwrite_edits: undo what someone changed since an earlier publish, such as the card, in the repository and in
            RUN/export of a run that is exported anew; also replace files of the repository that no publish wrote. An
            edited card in an export folder that is named itself goes up as it is.
        say: called with lines for the user; None drops them.

    Raises:
        ValueError: something can be mended before anything is written: the token, the name, the card, the export, files
            of others in the repository.
        RuntimeError: the Hub or the network failed; says whether anything was written. Or it is published, and does
            not work as it is there.
    """
    say, card, source = say or silent, card or CardOptions(), Path(source).expanduser()
    _check_arguments(source, repo_id, checkpoint, create_pr, revision)
    check_token()
    api, what = HfApi(library_name="hf_mae"), f"publishing {repo_id}"
    if not dry_run:
        with _explained(repo_id, what):
            check_rights(api, repo_id, create_pr=create_pr, say=say)
    with tempfile.TemporaryDirectory(prefix="hf_mae_publish_") as name:
        work = Path(name)
        with _disk_explained(repo_id, what), ExitStack() as lock:
            run, folder = _export(source, repo_id, work, target, weights, code, card, lock, overwrite_edits, say)
            record = json.loads((folder / RECORD).read_text())
            of_run = _take_checkpoint(run, record, weights, work / "taken") if checkpoint and run is not None else []
            written = write_card(folder, repo_id, card, run=run, evaluations=evaluations, keep_edits=True, say=say)
            text = written.read_text(encoding="utf-8")
            verdict = _check(folder, repo_id, text, card, say)
            say("hashing the files")
            files = take(collect(folder), work / "taken") + of_run
        with _explained(repo_id, what):
            there = look(api, repo_id, revision, say=say, may_fail=dry_run)
            head = str(there.head)
            files = keep_times(files, there.files, lambda path: read_there(repo_id, path, head, say))
        listed = work / "files.json"
        listed.write_text(manifest_of(files, there.earlier))
        files.append(read_file(listed, MANIFEST))
        rows = compare(files, there.files, there.earlier)
        license_id = (metadata_load(work / "taken" / "README.md") or {}).get("license", "none")
        for line in _announce(repo_id, there, rows, str(license_id), revision, private, create_pr):
            say(line)
        beside = clashes(rows, there.files)
        theirs = [row.path for row in rows if row.state == "foreign"]
        if "README.md" in theirs and _is_empty_card(read_there(repo_id, "README.md", head, say)):
            theirs.remove("README.md")
        _check_there(repo_id, rows, beside, theirs, create_pr=create_pr, overwrite_edits=overwrite_edits, say=say)
        url = f"{api.endpoint}/{repo_id}"
        if dry_run:
            _say_verdict(verdict, say)
            say("dry run: nothing was written to the Hub")
            return Published(url, "", None, verdict, rows)
        with _explained(repo_id, what):
            commit, pull_request = write(
                api, repo_id, files, rows, there, private=private, create_pr=create_pr, revision=revision,
                message=message or _message(record, source), say=say,
            )  # fmt: skip
            say("reading it back")
            _read_back(api, repo_id, commit, files, rows)
            verdict = _judge(api, repo_id, commit, record)
        say(f"{'unchanged' if commit == there.head else 'published'}: {pull_request or url} ({commit[:10]})")
        if usage_blocks(text):  # an edited card may have none
            _try_there(text, repo_id, card, on_main=pull_request is None and revision in (None, "main"), say=say)
        _say_verdict(verdict, say)
        if verdict.problems and not beside:  # of a pull request beside files of others that was said before
            raise RuntimeError(f"{repo_id} is published ({commit[:10]}), but not as it should be: {_found(verdict)}")
        return Published(url, commit, pull_request, verdict, rows)


@contextmanager
def _explained(repo_id: str, what: str) -> Iterator[None]:
    """Turn errors of the client into sentences."""
    try:
        yield
    except GaveUpError:
        raise
    except (OSError, HTTP_ERROR) as error:
        raise explain(error, repo_id=repo_id, what=what) from error


@contextmanager
def _disk_explained(repo_id: str, what: str) -> Iterator[None]:
    """Turn a full disk into a sentence; other errors of files name the file themselves."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            f"{what}: the disk is full: {error}; files are copied to {tempfile.gettempdir()} before they are sent "
            "(TMPDIR moves that); free some space there or beside the run, then run the same command again"
        ) from error


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


def _export(
    source: Path,
    repo_id: str,
    work: Path,
    target: Target,
    weights: Any,
    code: bool,
    card: CardOptions,
    lock: ExitStack,
    overwrite_edits: bool,
    say: Say,
) -> tuple[Path | None, Path]:
    """Return the run folder, if there is one, and the export folder, which is made if need be."""
    picture = card.sample[0] if card.sample else None
    if (source / "checkpoints").is_dir():
        lock.enter_context(_alone(source / "export"))
        say(f"exporting {source}")
        try:
            return source, export(
                source, None, target, weights=weights, picture=picture, code=code, overwrite=overwrite_edits, say=say
            )
        except WouldOverwriteError as error:
            there = error.folder
            raise ValueError(
                f"{there} would be exported anew, and {', '.join(shown(error.files))} there may have been edited or "
                f"added by you; publish it as it is ({shlex.join(['hf-mae', 'publish', str(there), repo_id])}), or "
                "replace all of it with overwrite_edits=True (--overwrite-edits)"
            ) from error
    if (source / RECORD).is_file():
        made = json.loads((source / RECORD).read_text())["target"]
        if weights != "last" or code or target not in ("auto", made):
            raise ValueError(
                f"{source} is an export already, to {made}: target, weights and code were chosen when it was made; "
                "name its run to export anew"
            )
        above = source.absolute().parent.parent
        run = above if (above / "recipe.json").is_file() else None
        lock.enter_context(_alone(source if run is None else source.absolute().parent))
        return run, source
    say(f"exporting {source}")
    folder = work / "export" / source.absolute().name
    return None, export(source, folder, target, weights=weights, picture=picture, code=code, say=say)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other publishes out of a folder in which exports, cards and records are written."""
    folder.mkdir(exist_ok=True)
    lock = RunLock(folder)
    try:
        try:
            lock.acquire()
        except RuntimeError as error:
            raise RuntimeError(
                f"{folder} is being published by another process; wait until it uploads, then run the same command "
                "again"
            ) from error
        yield
    finally:
        lock.release()


def _take_checkpoint(run: Path, record: Mapping[str, Any], weights: str, into: Path) -> list[File]:
    """Take the run's checkpoint at once: checks take minutes, and the run may go on."""
    step = record.get("source", {}).get("step")
    named: list[Named] = collect_checkpoint(run, step=None if weights == "best" else step)
    return take(named, into)


def _check(folder: Path, repo_id: str, text: str, card: CardOptions, say: Say) -> Verdict:
    """Run everything that can be run before the upload. The outcome of the usage lines goes into the records."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if problems := validate_card(text, files=names):
        raise ValueError(f"the card of {repo_id} would not do: {'; '.join(problems)}")
    picture = card.sample[0] if card.sample else None
    say("checking the folder, and running the pipeline on a picture")
    verdict = check_folder(folder, picture=picture)
    if verdict.problems:
        raise ValueError(f"{folder} is not ready to be published: {_found(verdict)}")
    if is_edited(folder, "README.md"):
        if not usage_blocks(text):
            say("the edited card has no usage examples, so none are run")
            return verdict
        if repo_id not in text:
            raise ValueError(
                f"{folder / 'README.md'} was edited, and its usage examples do not name {repo_id}, where it goes; "
                "change them, or name the repository that they name"
            )
    say(f"running the card's {len(usage_blocks(text))} usage examples")
    usage = run_usage(text, folder, repo_id, picture=picture)
    write_files(folder, {USAGE: (json.dumps(usage, indent=1) + "\n").encode()}, overwrite=True)
    say(f"the card's {len(usage['blocks'])} usage examples ran")
    return verdict


def _found(verdict: Verdict) -> str:
    return "; ".join(f"{c.name}: {c.found} ({c.remedy})" for c in verdict.problems)


def _message(record: Mapping[str, Any], source: Path) -> str:
    return f"Publish {record.get('class', 'model')} of {record.get('source', {}).get('name', source.name)} with hf_mae"


def _say_verdict(verdict: Verdict, say: Say) -> None:
    for line in verdict.lines():
        say(line)


# ------------------------------------------------------------------------------------------------ the repository


def _is_empty_card(text: bytes) -> bool:
    """Say whether a card has front matter only: the Hub writes one where a licence is chosen for a new repository."""
    return re.fullmatch(rb"\s*(---\r?\n.*?\n---)?\s*", text, re.DOTALL) is not None


def _check_there(
    repo_id: str,
    rows: Sequence[Row],
    beside: Sequence[str],
    theirs: Sequence[str],
    *,
    create_pr: bool,
    overwrite_edits: bool,
    say: Say,
) -> None:
    """Refuse what would leave a repository that does not work, or undo someone's work unasked."""
    edited = [row.path for row in rows if row.state == "edited"]
    if edited and not overwrite_edits and not create_pr:  # a pull request undoes nothing by itself
        raise ValueError(
            f"{repo_id}: {', '.join(edited[:5])} changed on the Hub since it was published from here, and this would "
            "undo it; keep what was written there by publishing elsewhere, or pass overwrite_edits=True "
            "(--overwrite-edits)"
        )
    if not beside:
        if theirs and not overwrite_edits and not create_pr:
            raise ValueError(
                f"{repo_id} holds {', '.join(shown(theirs))} that hf-mae did not write, and this would replace "
                f"{'it' if len(theirs) == 1 else 'them'}; name another repository, propose it with --create-pr, or "
                "pass overwrite_edits=True (--overwrite-edits)"
            )
        return
    told = (
        f"{repo_id} holds files that are not of hf-mae and would be loaded in place of these, or mixed with them, or "
        f"can carry code: {', '.join(beside[:5])}{' ...' * (len(beside) > 5)}"
    )
    if not create_pr:
        raise ValueError(f"{told}; delete them there, name another repository, or propose it with --create-pr")
    say(f"{told}; delete them before the pull request is merged")


def _announce(
    repo_id: str,
    there: There,
    rows: Sequence[Row],
    license_id: str,
    revision: str | None,
    private: bool,
    create_pr: bool,
) -> Iterator[str]:
    where = "a pull request" if create_pr else f"branch {revision or 'main'}"
    where += "" if there.has_branch else " (new)"
    seen = "exists" if there.head else f"new and {'private' if private else 'public'}"
    yield f"{repo_id}, {seen if there.looked else 'not compared with the Hub'}: {where}, licence {license_id}"
    if there.head and private:
        yield "  private is for new repositories; who sees this one is set on its page"
    yield from describe(rows, compared=there.looked)
    if size := sum(row.size for row in rows if row.path.startswith("run/") and row.state != "remove"):
        yield (
            f"  run/ ({bytes_in_words(size)}) continues the run elsewhere; its recipe and environment name paths and "
            "processes of this machine"
        )


# ------------------------------------------------------------------------------------------------ afterwards


def _read_back(api: HfApi, repo_id: str, commit: str, files: Sequence[File], rows: Sequence[Row]) -> None:
    if wrong := differences(tree(api, repo_id, commit), files, rows):
        raise RuntimeError(
            f"{repo_id} at {commit} is not what was sent: {', '.join(wrong[:5])} differ; run the same command again, "
            "and look at the repository's page if it happens twice"
        )


def _judge(api: HfApi, repo_id: str, commit: str, record: Mapping[str, Any]) -> Verdict:
    def ask() -> dict[str, Any]:
        # ModelInfo leaves out what the page decides by, so the answer is read as it is.
        answer = get_session().get(f"{api.endpoint}/api/models/{repo_id}/revision/{commit}", headers=build_hf_headers())
        hf_raise_for_status(answer)
        return answer.json()

    return check_remote(patient(f"reading {repo_id}", ask), record)


def _try_there(text: str, repo_id: str, card: CardOptions, *, on_main: bool, say: Say) -> None:
    """Run the usage lines as a stranger would, from the Hub and with an empty cache."""
    if not on_main:
        say("the usage lines read the branch main, so they were run on the folder only")
        return
    picture = card.sample[0] if card.sample else None
    say("running the usage examples from the Hub, with an empty cache")
    try:
        # A client in a process of its own does not wait as we do, and it is new each time.
        patient(
            "running the usage lines",
            lambda: run_usage(text, None, repo_id, picture=picture),
            tries=3,
            say=say,
            passing=lambda error: PASSING.search(str(error)) is not None,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{repo_id} is published and whole, but the lines of its card did not run from there: {error}"
        ) from error
    say("the usage examples ran from the Hub")
