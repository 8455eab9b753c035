"""The judge: is this run on its line? One sample in, one verdict out, in constant memory.

HOW TO CALL IT (the monitor service and `losscast replay` do the same)

    from monitor.replay import Watch            # the Judge plus advice(): what a service keeps, one per active run
    watch = Watch(Settings(), prediction=dict|None, target_loss=float|None, total_tokens=float|None)
                                                # old_runs=old_runs(curves) for what finished runs of the recipe say
    verdict = watch.observe(sample)             # monitor.verdict.Verdict; .opened and .closed are the alerts that changed
    watch.observe_control(sample)               # the control run's sample, before ours of the same step
    watch.announce(step, "lr" | "data" | text)  # a planned change from this step on: its effect is not an anomaly
    watch.restarted(step, attempt)              # a new attempt goes on from `step`: continuity is checked from there
    watch.checkpoint(step, ok)                  # one to go back to was committed, or (ok=False) did not verify
    rows = watch.order.ready(attempt, rows)     # rows (seq, step, loss, ...) put in order, those that wait kept back
    watch.price_per_hour = 32.0                 # what an hour costs, for the advice
    state = watch.state_dict()                  # plain JSON, at most 10 KB (as compact JSON); Watch.from_state(settings, state, prediction=..., ...)
    watch.open_alerts()                         # tuple[Alert], the ones open now
    watch.advice()                              # monitor.verdict.Advice (Watch only: Judge knows nothing of advice)

Judge takes the same arguments and has everything but advice(). All that observe() changes is in state_dict():
Watch.from_state(...) goes on exactly where it was. Steps at or before the last one seen are duplicates and change
nothing (a non-finite one is still called); feed samples in step order.
"""

from monitor.judge.core import Judge
from monitor.judge.settings import Settings

__all__ = ["Judge", "Settings"]
