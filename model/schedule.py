"""Learning-rate schedule."""

from __future__ import annotations


def learning_rate(step: int, *, peak: float, total: int, warmup: int, decay: int) -> float:
    """Warmup-stable-decay (WSD, arXiv 2404.06395): the learning rate of step 0 .. total - 1.

    Rises linearly and reaches `peak` at step `warmup - 1`, stays there, and falls linearly from
    `peak` at step `total - decay` to 0 at step `total`, which is also its value ever after.

    Raises:
        ValueError: if a count is negative or warmup and decay overlap.
    """
    if min(step, total, warmup, decay) < 0 or warmup + decay > total:
        raise ValueError(
            f"need step >= 0 and warmup + decay <= total, got step={step}, warmup={warmup}, "
            f"decay={decay}, total={total}"
        )
    if step >= total:
        return 0.0
    if step < warmup:
        return peak * ((step + 1) / warmup)
    if step > total - decay:
        return peak * ((total - step) / decay)
    return peak
