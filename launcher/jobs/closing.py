"""Close a run that vanished: its log says so, whoever held it can write no more, and the monitor hears of the end."""

import os

from launcher.jobs.standing import Facts, run_log

DELIVERY_S = 5.0


def close(facts: Facts, reason: str) -> str:
    """Take the run and write an end entry. Returns what became of the word to the monitor, for a person.

    Raises Held where somebody took the run in the meantime.
    """
    # taking an attempt is what shuts the last holder out: an end entry alone would not keep it from committing
    with run_log(facts.folder).take("losscast end", wait=False) as holding:
        closes = facts.holder.attempt.attempt if facts.holder.attempt else holding.attempt
        holding.append("end", reason=reason, closes=closes, step=facts.step)
    return tell(facts, reason)


def tell(facts: Facts, reason: str) -> str:
    """Send run_ended, and before it whatever of the run still waits in its spool here. Says what became of it."""
    attempt = (
        facts.attempt or 1
    )  # the last that the monitor has heard of: one that only closes a run reports nothing
    monitor = facts.spec.monitor
    if monitor is None:
        return "it has no monitor"
    from launcher.reporter import Reporter

    token = os.environ.get(monitor.token_env, "")
    if not token:
        return f"the monitor was not told: {monitor.token_env} is not set here. Set it and run this again"
    reporter = Reporter(monitor.url, token, facts.spec.name, attempt, facts.folder.path / "spool", quiet=True)
    delivered = reporter.close(reason=reason, timeout_s=DELIVERY_S)
    stats = reporter.stats()
    if delivered and not stats.refused:
        return "the monitor was told"
    return f"the monitor was not told: {stats.last_error or f'{stats.refused} lines were refused'}"
