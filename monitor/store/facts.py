"""What the service knows of a run without judging it: who, which attempt, how far, when last heard of.

Kept up to date by the writer in the same transaction as the samples, one small row a run. Times are seconds since the
epoch: `*_time` by the sender's clock, `*_received` by this machine's, which is the one that decides what is stalled.
"""

import math
import zlib
from typing import Literal

import msgspec

Phase = Literal["waiting", "running", "ended"]


class AttemptFacts(msgspec.Struct):
    """One attempt. It trains from `resume_step + 1` on; a newer attempt takes over the steps it replays."""

    attempt: int
    resume_step: int | None = None
    """None until known: a first sample at step s then says s - 1."""
    started_time: float | None = None
    samples: int = 0
    last_step: int | None = None


class RunFacts(msgspec.Struct):
    """One run, as of its last commit."""

    run_id: int
    run: str
    owner: str = ""
    """Id of the token that registered it, for quotas."""
    team: str | None = None
    attempts: list[AttemptFacts] = []
    ended_time: float | None = None
    ended_received: float | None = None
    end_reason: str | None = None
    created_received: float = 0.0
    started_time: float | None = None
    last_time: float | None = None
    last_received: float = 0.0
    """Anything at all was heard, a heartbeat too."""
    last_step_received: float | None = None
    attempt_received: float | None = None
    """The newest attempt was first heard of: nobody waited for its steps or checkpoints before."""
    restart_received: float | None = None
    """Whoever drives the run said that another attempt will begin."""
    step: int | None = None
    """Where its newest attempt is."""
    furthest_step: int | None = None
    """Where any attempt has been; None too in what was written before this was kept."""
    loss: float | None = None
    """Last finite one, nats per token."""
    last_loss: float | None = None
    """Last one, finite or not."""
    tokens: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    samples: int = 0
    nan_samples: int = 0
    inf_samples: int = 0
    skew_s: float = 0.0
    """Sender's clock minus ours at the last request, seconds; late delivery makes it negative."""
    target_loss: float | None = None
    total_tokens: float | None = None
    price_per_hour: float | None = None
    control: str | None = None
    prediction_ord: int | None = None
    last_ord: int = 0
    event_ord: int = 0
    """Ordinal of its newest event."""
    gpu_seconds: dict[str, float] = {}
    """useful, lost and idle, over the whole run, as its launcher counts them; empty where none told."""
    gpu_dollars: dict[str, float] = {}
    steps_lost: int | None = None
    restarts: dict[str, int] = {}
    restarts_since_step: int = 0
    """Attempts that began since the run was last further than ever: steps that are done again are no way forward."""
    checkpoint_received: float | None = None
    checkpoint_step: int | None = None
    checkpoint_interval_s: float | None = None
    """Longest of the recent times between two checkpoints."""
    checkpoint_failures: int = 0
    checkpoint_failed_received: float | None = None
    leases_lost: int = 0
    lease_lost_received: float | None = None
    imported: bool = False
    """Recorded elsewhere and sent afterwards: judged and shown, and nobody is paged for it."""

    @property
    def phase(self) -> Phase:
        if self.ended_received is not None:
            return "ended"
        return "waiting" if self.step is None else "running"

    @property
    def attempt(self) -> int | None:
        """The newest attempt, the one that is listened to."""
        return self.attempts[-1].attempt if self.attempts else None

    def attempt_facts(self, attempt: int) -> AttemptFacts | None:
        for found in reversed(self.attempts):
            if found.attempt == attempt:
                return found
        return None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(RunFacts).decode


def seal(*parts: object) -> int:
    """CRC-32 over a row's parts, kept beside them: SQLite itself does not notice a flipped byte."""
    crc = zlib.crc32(
        repr([part for part in parts if type(part) is not bytes]).encode("utf-8", "backslashreplace")
    )
    for part in parts:
        if type(part) is bytes:
            crc = zlib.crc32(part, crc)
    return crc


def two_seals(head: tuple[object, ...], body: bytes) -> tuple[int, int]:
    """`seal(*head)`, and `seal` of the whole row: head, that seal, body. At half the cost, since there are many such rows.

    head  holds no bytes
    """
    text = repr(list(head))
    first = zlib.crc32(text.encode("utf-8", "backslashreplace"))
    whole = f"{text[:-1]}, {first}]".encode("utf-8", "backslashreplace")
    return first, zlib.crc32(body, zlib.crc32(whole))


def to_bytes(facts: RunFacts) -> bytes:
    """For the store."""
    return _encode(facts)


def from_bytes(blob: bytes) -> RunFacts:
    """Back from the store. Raises msgspec.MsgspecError when it is damaged."""
    return _decode(blob)


def finite(value: float | None) -> bool:
    """True for a number that is there and finite."""
    return value is not None and math.isfinite(value)
