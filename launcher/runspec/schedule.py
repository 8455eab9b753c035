"""The learning rate of each optimizer step: a pure function of the spec.

Steps count from 1, as `step` does on the wire: step s sees tokens up to s * batch_tokens. Step 0 is before the
first update, where warm-up starts from zero.

    warm-up    t <= W        lr * t / W
    wsd        then lr, and over the last `decay_tokens` a line down to final_lr
    cosine     final + (lr - final) * (1 + cos(pi * u)) / 2,   u from 0 at W to 1 at the last step
    linear     lr + (final - lr) * u
    constant   lr

t = step * batch_tokens, W = warmup_tokens. The last step, whose tokens may pass `train.tokens` by part of a batch,
learns at exactly final_lr. This is the base rate: `train.lr_base_width` scales hidden matrices on top of it.
"""

import math

from launcher.runspec.model import RunSpec


def lr_at(step: int, spec: RunSpec) -> float:
    """Base learning rate of optimizer step `step`, 0 <= step; after the last step it stays where it ended.

    Raises ValueError for a negative step.
    """
    if step < 0:
        raise ValueError(f"need step >= 0; got {step}")
    train, schedule = spec.train, spec.train.schedule
    end = spec.total_steps * train.batch_tokens
    seen = min(step * train.batch_tokens, end)
    warmup, peak, final = schedule.warmup_tokens, train.lr, schedule.final_lr
    if seen < warmup:
        return peak * seen / warmup
    if schedule.kind == "constant":
        return peak
    start = end - (schedule.decay_tokens or 0) if schedule.kind == "wsd" else warmup
    if seen <= start < end:
        return peak
    if end <= start:  # nothing to decay over: wsd with decay_tokens 0
        return peak
    u = (seen - start) / (end - start)
    if schedule.kind == "cosine":
        return final + (peak - final) * (1 + math.cos(math.pi * u)) / 2
    return peak * (1 - u) + final * u


def schedule_rows(spec: RunSpec, at_most: int = 2000) -> list[tuple[int, float]]:
    """(step, lr) from step 0 to the last, thinned to about `at_most` rows that a line between them restores.

    Corners (end of warm-up, start of decay) are kept exactly.
    """
    total, train, schedule = spec.total_steps, spec.train, spec.train.schedule
    corners = {
        0,
        1,
        total,
        min(total, math.ceil(schedule.warmup_tokens / train.batch_tokens)),
    }
    corners.add(min(total, schedule.warmup_tokens // train.batch_tokens))
    if schedule.kind == "wsd":
        start = total - (schedule.decay_tokens or 0) / train.batch_tokens
        corners |= {max(0, math.floor(start)), max(0, math.ceil(start))}
    stride = max(1, math.ceil(total / at_most))
    return [(s, lr_at(s, spec)) for s in sorted(corners | set(range(0, total + 1, stride)))]
