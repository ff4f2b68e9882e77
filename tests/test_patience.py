"""Waiting for the Hub: what passes by itself, how long it is waited for, and what the rest means to a user."""

from __future__ import annotations

import errno
import socket
import ssl

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_mae import patience
from hf_mae.data import formats
from hf_mae.patience import GaveUpError, explain, patient, remedy

HTTP = __import__(patience.HTTP_ERROR.__module__)


def answer(status: int, kind=HfHubHTTPError, **headers: str):
    request = HTTP.Request("GET", "http://127.0.0.1/api/models/org/x")
    return kind(f"{status} for url", response=HTTP.Response(status, headers=headers, request=request))


def unconnected(reason: OSError) -> BaseException:
    """As the client does it: an error of its own, raised from that of the system."""
    try:
        raise HTTP.ConnectError(str(reason)) from reason
    except HTTP.ConnectError as error:
        return error


def wrapped(error: BaseException) -> OSError:
    """As transformers does it: an OSError without a response, raised from the reason."""
    try:
        try:
            raise error
        except type(error) as reason:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files") from reason
    except OSError as outer:
        return outer


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    return pauses


def failing(*errors: BaseException):
    """A call that raises these in turn, then returns `done`."""
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


PASSING = {
    "429": answer(429),
    "503": answer(503),
    "500": answer(500),
    "refused": HTTP.ConnectError("Connection refused"),
    "cut": HTTP.RemoteProtocolError("peer closed connection"),
    "timeout": HTTP.ReadTimeout("timed out"),
    "of the system": OSError(errno.ECONNRESET, "Connection reset by peer"),
    "shared client closed by another thread": RuntimeError("Cannot send a request, as the client has been closed."),
    "shared client put away by another thread": AttributeError(
        "'NoneType' object has no attribute 'request'", name="request", obj=None
    ),
    "wrapped by transformers": wrapped(answer(503)),
    "server of names does not answer": unconnected(socket.gaierror(socket.EAI_AGAIN, "Temporary failure")),
}
LASTING = {
    "401": answer(401),
    "403": answer(403),
    "404": answer(404, RepositoryNotFoundError),
    "412": answer(412),
    "offline": wrapped(OfflineModeIsEnabled("offline")),
    "no file": FileNotFoundError("nothing here"),
    "a value": ValueError("wrong"),
    "a mistake of ours": AttributeError("'NoneType' object has no attribute 'sha'", name="sha", obj=None),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "given up before": GaveUpError("gave up"),
    "a certificate": unconnected(ssl.SSLCertVerificationError(1, "CERTIFICATE_VERIFY_FAILED")),
    "no such name": unconnected(socket.gaierror(socket.EAI_NONAME, "Name or service not known")),
    "no such scheme": HTTP.UnsupportedProtocol("Request URL is missing an 'http://' or 'https://' protocol."),
    "our own fault": HTTP.LocalProtocolError("Illegal header value"),
    "not what it says": HTTP.DecodingError("Error -3 while decompressing data"),
}


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_tried_again(error, slept):
    said: list[str] = []
    assert patient("reading x", failing(error, error), say=said.append) == "done"
    assert slept == [1, 2]
    assert len(said) == 2
    assert "reading x: " in said[0]
    assert "trying again in 1 s (1 of 6 tries)" in said[0]


@pytest.mark.parametrize("error", LASTING.values(), ids=LASTING.keys())
def test_what_does_not_pass_is_raised_at_once(error, slept):
    with pytest.raises(type(error)) as caught:
        patient("reading x", failing(error))
    assert caught.value is error
    assert slept == []


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry-After": "7"}, 8),
        ({"RateLimit": '"api";r=0;t=41'}, 42),
        ({"RateLimit": '"api";r=12;t=41'}, 1),
        ({"Retry-After": "86400"}, patience.LONGEST_PAUSE),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1),
    ],
)
def test_the_pause_is_the_one_the_server_asks_for(headers, pause, slept):
    patient("x", failing(answer(429, **headers)), say=[].append)
    assert slept == [pause]


def test_it_gives_up_with_what_was_tried_and_a_remedy_and_no_outer_call_tries_again(slept):
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise answer(503)

    with pytest.raises(
        GaveUpError,
        match=r"reading x failed 3 times in \d+ s: 503 Service Unavailable from 127.0.0.1/api/models/org/x; .*run",
    ):
        patient("outside", lambda: patient("reading x", call, tries=3, say=[].append), say=[].append)
    assert len(calls) == 3
    assert slept == [1, 2]


def test_no_call_waits_as_long_as_other_processes_wait_for_this_one(slept):
    """The others end the run when a collective takes half an hour."""
    from hf_mae.training import distributed

    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise answer(429, **{"Retry-After": "300"})

    with pytest.raises(GaveUpError, match=r"failed 3 times in 602 s: 429 .*; wait five minutes.*run the same command"):
        patient("reading x", call, tries=100, say=[].append)
    assert slept == [301, 301]
    assert len(calls) == 3
    assert distributed.COLLECTIVE_TIMEOUT.total_seconds() >= 2 * patience.LONGEST_WAIT


def test_the_time_of_the_calls_counts_too(slept, monkeypatch):
    clock = iter(range(0, 10**6, 400))
    monkeypatch.setattr(patience.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(GaveUpError, match="failed 3 times in 1203 s"):
        patient("x", failing(*[answer(503)] * 9), say=[].append)


def test_a_remedy_tells_what_to_do_with_data_that_did_not_come(slept):
    for error, words in (
        (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
        (OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
        (answer(403, GatedRepoError), "accept the conditions"),
        (answer(403, **{"X-Error-Code": "Forbidden"}), "log in with"),
        (answer(401), "log in with"),
        (answer(400), "asking again would be answered the same way"),
        (LASTING["a certificate"], "SSL_CERT_FILE"),
    ):
        assert words in remedy(error)
        with pytest.raises(RuntimeError, match=rf"could not read x: .*{words}.*from its last checkpoint") as caught:
            formats.retry(failing(error), "x")
        assert caught.value.__cause__ is error  # and no GaveUpError in between: it was asked for once
    assert slept == []


@pytest.mark.parametrize(
    "error",
    [answer(403), OSError("Unexpected end of stream"), *PASSING.values()],
    ids=["an expired signature", "torn", *PASSING.keys()],
)
def test_data_that_may_come_later_are_waited_for(error, slept):
    assert formats.retry(failing(error), "x", first=True) == "done"
    assert slept == [1]


def test_a_name_that_was_found_before_is_waited_for(slept):
    error = LASTING["no such name"]
    with pytest.raises(RuntimeError, match=r"HF_ENDPOINT"):
        formats.retry(failing(error), "x", first=True)
    assert slept == []
    assert formats.retry(failing(error), "x") == "done"
    assert slept == [1]


def test_a_reader_gives_up_after_minutes(slept, caplog):
    with pytest.raises(RuntimeError, match=r"could not read x: ConnectionRefused.*check the network.*last checkpoint"):
        formats.retry(failing(*[ConnectionRefusedError(errno.ECONNREFUSED, "refused")] * 99), "x")
    assert 180 <= sum(slept) <= 600
    assert len(caplog.records) == len(slept)


def test_each_wait_is_a_line_on_standard_error_without_a_listener(slept, caplog):
    patient("reading x", failing(answer(503)))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "reading x: 503 Service Unavailable" in caplog.text


def test_no_line_tells_a_token(monkeypatch, slept):
    monkeypatch.setenv("HF_TOKEN", "hf_alice_write")
    said: list[str] = []
    error = HTTP.ConnectError("Bearer abc sent hf_alice_write and hf_" + "A" * 34)
    patient("x", failing(error), say=said.append)
    assert "alice" not in said[0]
    assert "abc" not in said[0]
    assert "AAAA" not in said[0]
    assert "alice" not in str(explain(error, repo_id="org/x", what="publishing"))


def test_no_line_tells_a_signed_address(slept):
    said: list[str] = []
    request = HTTP.Request("GET", "http://store/get/x?Signature=secret")
    signed = HfHubHTTPError("403 for http://store/get/x?Signature=secret", response=HTTP.Response(503, request=request))
    cut = HTTP.ReadError("lost 'https://store/get/x?Signature=secret'")
    patient("x", failing(signed, cut), say=said.append)
    assert "503 Service Unavailable from store/get/x" in said[0]
    assert "lost 'https://store/get/x'" in said[1]
    assert "secret" not in "".join(said)


MEANINGS = [
    (answer(401), ValueError, "does not know this token; log in anew"),
    (answer(403, **{"X-Error-Message": "you must use a write token"}), ValueError, "you must use a write token.*role"),
    (answer(403, GatedRepoError), ValueError, "gated; accept its conditions"),
    (answer(404, RepositoryNotFoundError), ValueError, "no repository org/x that this token may see"),
    (answer(404, RevisionNotFoundError), ValueError, "no such revision"),
    (answer(409), RuntimeError, "changed by someone else"),
    (answer(412), RuntimeError, "changed by someone else.*nothing of yours was written.*run the same command again"),
    (answer(429), RuntimeError, "429.*wait five minutes.*fewer requests.*run the same command again"),
    (answer(503), RuntimeError, "503.*check the network"),
    (answer(400, **{"X-Error-Message": "bad card"}), ValueError, "400: bad card"),
    (OfflineModeIsEnabled("x"), RuntimeError, "unset HF_HUB_OFFLINE"),
    (HTTP.ConnectError("refused"), RuntimeError, "ConnectError: refused; check the network"),
    (LocalTokenNotFoundError("x"), ValueError, "there is none; log in"),
    (LocalEntryNotFoundError("x"), RuntimeError, "cannot be reached and the file is not in the cache"),
    (OSError(errno.ENOSPC, "No space left on device"), RuntimeError, "the disk is full; free some space"),
    (PermissionError(errno.EACCES, "Permission denied"), RuntimeError, "make the file readable.*writable"),
    (LASTING["a certificate"], RuntimeError, "name the certificates of a proxy in between with SSL_CERT_FILE"),
    (LASTING["no such name"], RuntimeError, "check the network, and the spelling of HF_ENDPOINT"),
]


@pytest.mark.parametrize(("error", "kind", "words"), MEANINGS, ids=[m[2][:24] for m in MEANINGS])
def test_an_error_is_explained_in_one_sentence_with_a_remedy(error, kind, words):
    for one in (error, wrapped(error)):
        found = explain(one, repo_id="org/x", what="publishing org/x")
        assert type(found) is kind
        assert "\n" not in str(found)
        with pytest.raises(kind, match=f"^publishing org/x.*{words}"):
            raise found
