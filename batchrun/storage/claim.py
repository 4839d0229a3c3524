"""A claim on a folder of an object store: of any number of writers at most one holds it.

Each writer puts an object under its own name and then lists them all. It holds the claim only if no other writer's
object is there: of two writers, the one that lists second sees the first, so at most one holds the claim. That
needs no conditional put, which pyarrow does not have, but a list that shows every earlier put (S3, Google Cloud Storage
and Azure have one).

A claim is renewed while its writer works, and one that was not renewed for `STALE_S` seconds, by the store's clock, is
that of a dead writer and is deleted. A writer whose claim is gone has lost it and publishes nothing any more.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import msgspec

from batchrun.errors import BatchrunError, RunLockedError, StorageError
from batchrun.storage.folder import CONTROL, RemoteFolder, RemoteObject

RENEW_S = 60.0  # one small request a minute
STALE_S = 300.0  # a store may be away for a few renewals
WITHDRAWN_S = 2.0  # a writer that has seen this claim has deleted its own by then
TRIES = 4
"""Two writers that start together both withdraw, wait for a random while and try again."""


class Writer(msgspec.Struct, frozen=True):
    """The writer that works on a run, as a claim's object stores it."""

    writer: str
    job: str
    host: str
    pid: int
    since: datetime

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since:%Y-%m-%d %H:%M:%S} UTC"


def this_process(writer: str, job: str) -> Writer:
    """This process as a writer from now on."""
    return Writer(writer, job, socket.gethostname(), os.getpid(), datetime.now(UTC).replace(microsecond=0))


class Claim:
    """The claim of one writer on a folder. In its block the writer holds it, or has lost it, which `require_held`
    reports.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        mine: Writer,
        *,
        sleep: Callable[[float], None] = time.sleep,
        stale_s: float = STALE_S,
    ) -> None:
        self.folder = folder
        self._claims = folder.below(f"{CONTROL}/claims")
        self.mine = mine
        self._name = f"{mine.writer}.json"
        self._sleep = sleep
        self._stale_ns = int(stale_s * 1e9)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)

    def __enter__(self) -> Self:
        """The claim is held.

        Raises:
            RunLockedError: another writer works there.
            StorageError: the store refuses, or can't be reached.
        """
        for tried in range(TRIES):
            self._put()
            if not (others := self._others(remove_stale=True)):
                self._thread.start()
                return self
            self._claims.delete(self._name)
            if tried + 1 < TRIES:
                self._sleep(0.2 + secrets.randbelow(1000) / 1000 * 2**tried)
        raise RunLockedError(f"{self.folder}: another run works there ({self._who(others[0])}); nothing was sent")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self._claims.delete(self._name)
        except StorageError:
            return  # the store is away: the claim becomes stale by itself

    def require_held(self) -> None:
        """Returns if no other writer has taken over; the claim is renewed.

        Raises:
            RunLockedError: one has.
        """
        others: list[RemoteObject] = []
        if self._claims.find(self._name) is not None:
            self._put()
            for _ in range(TRIES):
                if not (others := self._others(remove_stale=False)):
                    return
                self._sleep(WITHDRAWN_S)  # one that has just started sees this claim, and withdraws its own
            self._claims.delete(self._name)
        who = f" ({self._who(others[0])})" if others else ""
        raise RunLockedError(
            f"{self.folder}: another run has taken over there{who}; this run's own result stays on this machine"
        )

    def _put(self) -> None:
        self._claims.put(self._name, msgspec.json.encode(self.mine))

    def _others(self, *, remove_stale: bool) -> list[RemoteObject]:
        """The claims of other writers that are not stale."""
        found = self._claims.objects()
        now = max((each.mtime_ns for each in found), default=0)  # our own is the newest, or nearly
        others = [each for each in found if each.name != self._name]
        fresh = [each for each in others if now - each.mtime_ns < self._stale_ns]
        if remove_stale:
            for each in others:
                if each not in fresh:
                    self._claims.delete(each.name)
        return fresh

    def _who(self, claim: RemoteObject) -> str:
        """The writer of another claim, in words."""
        content = self._claims.read(claim.name)
        try:
            return str(msgspec.json.decode(content or b"", type=Writer))
        except msgspec.DecodeError:
            return "it has just ended" if content is None else claim.name

    def _renew(self) -> None:
        """In a thread of its own: renews the claim until it ends or is lost."""
        while not self._ended.wait(RENEW_S):
            try:
                if self._claims.find(self._name) is None:
                    return  # lost: `require_held` will say so
                self._put()
            except BatchrunError:
                continue  # the store is away for now
