"""Waiting for the Hub: which errors pass by themselves, how long they are waited for, and what the others mean.

The stock client waits in some calls and gives up at once in others (a GET of a file that answers 503, model_info that
answers 429, the POST of a commit), and the libraries above it wrap the reason in errors of their own. `patient` looks
through the wrapping and calls again; `explain` turns what is left into one sentence with a remedy.
"""

from __future__ import annotations

import errno
import logging
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

T = TypeVar("T")

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all errors of the HTTP client that huggingface_hub was built on (httpx or httpx2)."""

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Seconds between two tries; the last goes on for ever."""

LONGEST_PAUSE = 330.0
"""Seconds: what a server asks for is kept up to here. The Hub counts requests in windows of five minutes."""

LONGEST_WAIT = 900.0
"""Seconds that one `patient` takes in all, calls and pauses: below the half hour after which the other processes of a
run that wait for this one end it. Waits one after another are not added up."""

QUICK = 10.0
"""Seconds that the Hub has for the answer whether it knows a name."""

_FILES = (
    *(".parquet", ".tar", ".zip", ".gz", ".tgz", ".arrow", ".json", ".jsonl", ".csv", ".txt", ".lance", ".npy", ".h5"),
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pth", ".pt", ".safetensors"),
)

_CLIENT = vars(sys.modules[HTTP_ERROR.__module__])
_TRANSPORT: type[Exception] = _CLIENT["TransportError"]
# A slip in an address, a fault of our own, or an answer that would come again as it was.
_LASTING: tuple[type[Exception], ...] = tuple(
    _CLIENT[name] for name in ("UnsupportedProtocol", "LocalProtocolError", "DecodingError")
)
_PASSING_ERRNOS = frozenset(
    getattr(errno, name)
    for name in ("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH")
)
_OTHER_NUMBERS = (ssl.SSLError, socket.gaierror)
_log = logging.getLogger("hf_mae.patience")


class GaveUpError(RuntimeError):
    """The network did not let something through, however often it was tried. Never tried again by another `patient`."""


def patient(
    what: str,
    call: Callable[[], T],
    *,
    tries: int = 6,
    say: Callable[[str], None] | None = None,
    pauses: Sequence[float] | None = None,
    passing: Callable[[BaseException], bool] | None = None,
) -> T:
    """Call until the network lets it through: after 429, 5xx, a cut connection or a timeout; any other error at once.

    It gives up after `tries` calls, or before a pause that would end later than `LONGEST_WAIT` seconds after the start.

    Args:
        what: what is being done, for messages: `reading config.json of org/x`.
        call: is called again from its beginning, so it must not leave anything half-done.
        tries: calls in all; with 6 and the default pauses, 31 s of waiting.
        say: takes one line for each wait; None logs a warning, which Python prints to standard error.
        pauses: seconds between two tries, None for `PAUSES`; a server's `Retry-After` or `RateLimit` comes first.
        passing: decides which errors are worth another try; None for `is_passing`.

    Raises:
        GaveUpError: a RuntimeError: it never got through; says how long was tried, and what to do.
    """
    pauses, passing = PAUSES if pauses is None else pauses, passing or is_passing
    spent = 0.0
    for n in range(1, tries + 1):
        began = time.monotonic()
        try:
            return call()
        except (OSError, HTTP_ERROR, RuntimeError, ValueError, AttributeError) as error:
            if isinstance(error, GaveUpError) or not passing(error):
                raise
            spent += time.monotonic() - began
            asked = _asked_for(error)
            pause = pauses[min(n, len(pauses)) - 1] if asked is None else asked
            if n == tries or spent + pause > LONGEST_WAIT:
                times = "once" if n == 1 else f"{n} times"
                raise GaveUpError(
                    f"{what} failed {times} in {spent:.0f} s: {one_line(error)}; {remedy(error)}, then run the same "
                    "command again"
                ) from error
            spent += pause
            (say or _log.warning)(f"{what}: {one_line(error)}; trying again in {pause:.0f} s ({n} of {tries} tries)")
        time.sleep(pause)
    raise AssertionError("tries is at least 1")


def may_be_hub_id(name: str) -> bool:
    """Return whether the Hub could have a repository of that name: NAME or ORG/NAME, and not a path to a file."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or name.lower().endswith(_FILES):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def quick_look(repo_id: str, kind: Literal["model", "dataset"]) -> Exception | None:
    """Ask the Hub once whether it has a repository: a slip in a path must not wait for what tries again for minutes.

    Returns:
        None where it may be opened: the Hub answered, or does not, but something of it is in a cache on this machine.
        RepositoryNotFoundError where the Hub knows no such repository, which may be private. Else why the Hub could not
        be asked.
    """
    try:
        _look(repo_id, kind)
    except RepositoryNotFoundError as error:
        return None if isinstance(error, GatedRepoError) else error
    except HfHubHTTPError:
        return None  # busy, or the token is refused: what opens it says so in its own words, and waits if that helps
    except (OSError, HTTP_ERROR) as error:
        return None if _in_a_cache(repo_id, kind) else error
    return None


@cache
def _look(repo_id: str, kind: Literal["model", "dataset"]) -> None:
    """Raise what the Hub's client raises; an answer is remembered, an error is not."""
    HfApi().repo_info(repo_id, repo_type=kind, timeout=QUICK)


def _in_a_cache(repo_id: str, kind: Literal["model", "dataset"]) -> bool:
    if (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind)).exists():
        return True
    if kind == "model":
        return False
    from datasets.config import HF_DATASETS_CACHE  # takes a second to import

    return any(Path(HF_DATASETS_CACHE).glob(f"{repo_id.replace('/', '___')}*"))


def is_passing(error: BaseException) -> bool:
    """Say whether an error, or what it was raised from, goes away by itself: 429, 5xx, no answer, a cut, a timeout.

    A certificate that is not believed does not, nor a name that no server of names knows: it is misspelt, or this
    machine has no network. (`EAI_AGAIN`, a server of names that does not answer, does pass.) Who has reached that name
    before may think otherwise and ask `is_unknown_name`.
    """
    chain = list(_chain(error))
    if is_unknown_name(error) or any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
        return False
    for one in chain:
        if isinstance(one, (OfflineModeIsEnabled, GaveUpError, *_LASTING)):
            return False
        if (status := status_of(one)) is not None:
            return status == 429 or status >= 500
        if isinstance(one, (_TRANSPORT, TimeoutError, ConnectionError)):
            return True
        if isinstance(one, OSError) and not isinstance(one, _OTHER_NUMBERS) and one.errno in _PASSING_ERRNOS:
            return True
        # Another thread lost its connection, and the library closed the client that all threads share ...
        if isinstance(one, RuntimeError) and "client has been closed" in str(one):
            return True
        # ... or had just put it away: huggingface_hub 2.4's get_session then returns None.
        if isinstance(one, AttributeError) and one.obj is None and one.name in ("request", "stream", "send"):
            return True
    return False


def is_unknown_name(error: BaseException) -> bool:
    """Say whether a host was not found by its name, for good as far as the servers of names know."""
    return any(isinstance(one, socket.gaierror) and one.errno == socket.EAI_NONAME for one in _chain(error))


def may_be_expired(error: BaseException) -> bool:
    """Say whether a store refused an address that may have been signed too long ago: 403 without the Hub's own word."""
    refused = next((one for one in _chain(error) if status_of(one) is not None), None)
    if refused is None or status_of(refused) != 403 or isinstance(refused, (GatedRepoError, DisabledRepoError)):
        return False
    response: Any = vars(refused)["response"]
    return "X-Error-Code" not in response.headers


def is_overloaded(error: BaseException) -> bool:
    """Say whether a server answered, and the error is one that `is_passing`: 429 or 5xx."""
    return is_passing(error) and any(status_of(one) is not None for one in _chain(error))


def is_worth_opening_again(error: BaseException) -> bool:
    """Say whether opening a file of the Hub again may help: as `is_passing`, but for a Hub that nobody answers for.

    The stock client has tried that for 20 s by itself, and a slip in a path should not wait longer.
    """
    chain = list(_chain(error))
    unanswered = any(isinstance(one, LocalEntryNotFoundError) for one in chain) and not any(map(status_of, chain))
    return is_passing(error) and not unanswered


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an error, None if no server answered."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def one_line(error: BaseException) -> str:
    """Return what an error says in one line, without tokens and without signed addresses."""
    last = error.__cause__ if isinstance(error, GaveUpError) and error.__cause__ else error
    told = next((one for one in _chain(error) if status_of(one) is not None or isinstance(one, _TRANSPORT)), last)
    if (status := status_of(told)) is not None:
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "of no known meaning"
        response: Any = vars(told)["response"]
        said = response.headers.get("X-Error-Message")
        return hide_tokens(f"{status} {phrase} from {response.url.host}{response.url.path}" + f" ({said})" * bool(said))
    text = " ".join(f"{type(told).__name__}: {told}".split())
    return hide_tokens(re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]+", r"\1", text))[:300]


def hide_tokens(text: str) -> str:
    """Return a text without this machine's token, nor anything that looks like one."""
    with suppress(OSError):  # it may be in a file, and this is called when no file can be opened
        if token := get_token():
            text = text.replace(token, "hf_***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}|(?<=Bearer )\S+", "hf_***", text)


def remedy(error: BaseException) -> str:
    """Return what a user can do about an error that did not pass, as an imperative without a full stop."""
    chain = list(_chain(error))
    # Errors of certificates and of names count differently: 1 is not EPERM.
    numbers = {one.errno for one in chain if isinstance(one, OSError) and not isinstance(one, _OTHER_NUMBERS)}
    status = next((status for one in chain if (status := status_of(one)) is not None), None)
    if any(isinstance(one, OfflineModeIsEnabled) for one in chain):
        return "unset HF_HUB_OFFLINE: offline mode is on"
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return "free some space (`hf cache rm` clears the Hub's cache, HF_HOME moves it)"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return "make the file readable and its folder writable for this user (HF_HOME moves the Hub's cache)"
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in chain):
        return "check the clock, and name the certificates of a proxy in between with SSL_CERT_FILE"
    if is_unknown_name(error):
        return "check the network, and the spelling of HF_ENDPOINT if it is set"
    if any(isinstance(one, GatedRepoError) for one in chain):
        return "accept the conditions on its page on the Hub, then log in with `hf auth login` as who was let in"
    if status in (401, 403):
        return "log in with `hf auth login` as a user with access"
    if status == 429:
        return "wait five minutes: the Hub asks for fewer requests (a token, `hf auth login`, has a higher limit)"
    if status is not None and status < 500:
        return "look at its page on the Hub: asking again would be answered the same way"
    return "check the network (https://status.huggingface.co tells of outages of the Hub)"


def explain(error: BaseException, *, repo_id: str, what: str) -> ValueError | RuntimeError:
    """Return what an error of the Hub's client means to a user, in one sentence with the remedy.

    Args:
        error: what was caught.
        repo_id: the repository that was meant.
        what: what was being done: `publishing org/x`.

    Returns:
        ValueError for what the user can change (token, name, access), RuntimeError for what the run met.
    """
    chain = list(_chain(error))
    status = next((status for one in chain if (status := status_of(one)) is not None), None)

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if met(OfflineModeIsEnabled):
        return RuntimeError(f"{what} needs the network, and offline mode is on; unset HF_HUB_OFFLINE")
    if met(LocalTokenNotFoundError):
        return ValueError(f"{what} needs a token and there is none; log in with `hf auth login` or set HF_TOKEN")
    if any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in chain):
        return RuntimeError(f"{what}: the disk is full; {remedy(error)}, then run the same command again")
    if met(HFValidationError):
        return ValueError(f"{what}: {repo_id!r} is not a repository name ({one_line(error)}); write it as ORG/NAME")
    if met(GatedRepoError):
        return ValueError(
            f"{what}: {repo_id} is gated; accept its conditions on its page on the Hub, then log in with "
            "`hf auth login` as the user who was let in"
        )
    if met(DisabledRepoError):
        return ValueError(f"{what}: the Hub has disabled {repo_id}; its page says why")
    if met(RevisionNotFoundError):
        return ValueError(f"{what}: {repo_id} has no such revision; its branches and tags are listed on its page")
    if met(RepositoryNotFoundError):
        return ValueError(
            f"{what}: there is no repository {repo_id} that this token may see; check the spelling, and log in with "
            "`hf auth login` as a user with access if it is private"
        )
    if status == 401:
        return ValueError(
            f"{what}: the Hub does not know this token; log in anew with `hf auth login`, or mend HF_TOKEN"
        )
    if status == 403:
        return ValueError(
            f"{what}: the token may not do this in {repo_id} ({_told(chain)}); use a token of a member of the "
            "organisation, with the role write if something is to be written (or propose it with --create-pr)"
        )
    if status in (409, 412):
        return RuntimeError(
            f"{what}: {repo_id} was changed by someone else in the meantime ({status}); nothing of yours was written; "
            "look at what is there now, then run the same command again"
        )
    if status == 429:
        return RuntimeError(f"{what}: {one_line(error)}; {remedy(error)}, then run the same command again")
    if met(LocalEntryNotFoundError) and status is None:
        return RuntimeError(f"{what}: the Hub cannot be reached and the file is not in the cache; check the network")
    if met(EntryNotFoundError):
        return ValueError(f"{what}: {repo_id} does not hold that file ({one_line(error)}); look at its list of files")
    if status is not None and status < 500:
        return ValueError(f"{what}: the Hub refused it for {repo_id} ({status}: {_told(chain)})")
    return RuntimeError(f"{what}: {one_line(error)}; {remedy(error)}, then run the same command again")


def _told(chain: Sequence[BaseException]) -> str:
    """Return what the server said in its own words."""
    for one in chain:
        response: Any = getattr(one, "response", None)
        if response is not None and (message := response.headers.get("X-Error-Message")):
            return hide_tokens(message)
    return one_line(chain[0])


def _asked_for(error: BaseException) -> float | None:
    """Return the seconds that the server asked to wait, one more than it said because it rounds."""
    for one in _chain(error):
        response: Any = getattr(one, "response", None)
        if response is None:
            continue
        asked = response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(float(asked) + 1, LONGEST_PAUSE)
        # RateLimit: "api";r=0;t=42 says that no request is left for 42 s.
        left = dict(re.findall(r";\s*(\w)=(\d+)", response.headers.get("RateLimit", "")))
        if left.get("r") == "0" and "t" in left:
            return min(float(left["t"]) + 1, LONGEST_PAUSE)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the outermost first."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__
