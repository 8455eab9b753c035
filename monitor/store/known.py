"""What memory holds of the store's runs, so that a request is checked without reading: the runs, and their samples' numbers."""

import sqlite3
from collections.abc import Iterable

from monitor.store.columns import Damaged, unpack
from monitor.store.facts import RunFacts
from monitor.store.intervals import Intervals
from monitor.store.store import Store


class Known:
    """The writer's own; others may look at `runs`. What a failed commit staged here is read from the store again."""

    def __init__(self, store: Store):
        self.store = store
        self.runs: dict[str, RunFacts] = {facts.run: facts for facts in store.runs()}
        self.next_ord = store.last_ord() + 1
        self.next_run_id = max((f.run_id for f in self.runs.values()), default=0) + 1
        self.owned: dict[str, int] = {}
        """How many runs each token registered."""
        for facts in self.runs.values():
            self.owned[facts.owner] = self.owned.get(facts.owner, 0) + 1
        self.gone: set[int] = set()
        """Ids of removed runs: what a judge still has to say of them is not kept."""
        self._seen: dict[tuple[int, int], Intervals] = {}

    def drop(self, gone: Iterable[RunFacts]) -> None:
        """These runs are not in the store any more."""
        ids = set()
        for facts in gone:
            del self.runs[facts.run]
            self.owned[facts.owner] -= 1
            ids.add(facts.run_id)
        self.gone |= ids
        self.forget_seen(ids)

    def seen(self, facts: RunFacts, attempt: int) -> Intervals:
        """Sequence numbers of the attempt that were taken; read from the store the first time."""
        key = facts.run_id, attempt
        found = self._seen.get(key)
        if found is None:
            found, have = Intervals(), 0
            for ord, n, first, last in self.store.seqs(facts.run_id, attempt):
                have += n
                if last - first + 1 == n:
                    found.add(first, last)
                else:
                    for seq in unpack(self.store.chunk(ord).body, want=frozenset({"seq"})).of["seq"]:
                        found.add(int(seq), int(seq))
            committed = self.store.run(facts.run)
            known = None if committed is None else committed.attempt_facts(attempt)
            if (
                known is not None and have != known.samples
            ):  # what can't be found would be taken a second time
                raise Damaged(
                    f"{known.samples - have} samples of run {facts.run}, attempt {attempt}, can't be found; "
                    f"see `losscast monitor repair`"
                )
            for event in self.store.events(facts.run_id):
                if event.attempt == attempt and event.fields.get("seq") is not None:
                    found.add(event.fields["seq"], event.fields["seq"])
            self._seen[key] = found
        return found

    def forget_seen(self, run_ids: set[int]) -> None:
        """Which sequence numbers these runs have is read from the store when it is asked for again."""
        if run_ids:
            for key in [key for key in self._seen if key[0] in run_ids]:
                del self._seen[key]

    def reload(self, names: set[str], run_ids: set[int]) -> bool:
        """Forget what memory holds of these runs and read it from the store again. False where not all can be read."""
        self.forget_seen(run_ids)
        whole = True
        for name in names:
            try:
                facts = self.store.run(name)
            except (sqlite3.Error, Damaged, OSError, ValueError):
                whole = False  # its counts stay as they are; its seqs come from disk next time
                continue
            if facts is None:
                gone = self.runs.pop(name, None)
                if gone is not None:
                    self.owned[gone.owner] -= 1
            else:
                self.runs[name] = facts
        return whole
