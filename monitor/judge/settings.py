"""What the judge is set to: budgets as heights of its tests, and tolerances.

Sigmas are robust standard deviations of one sample's residual. Samples are counted, never steps or seconds, so that
a curve in other step units or another spacing is judged alike. The defaults keep the two budgets (one false warning
in 100,000 healthy samples, one false page in a hundred healthy runs of a million) on the noise that
`bench/judge.py` measures; a higher height buys fewer alarms with later ones.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Heights, windows and tolerances of the judge."""

    warn: float = 9.0
    """Height (sigmas) of the patient CUSUM that opens LossOffLine."""
    warn_quick: float = 7.5
    """Height (sigmas) of the quick one, which finds shifts of several sigmas in two or three samples."""
    warn_control: float = 8.0
    """Height (sigmas of what a control leaves) of the quick CUSUM on it."""
    page: float = 55.0
    """Summed sigmas over the reference since the onset, without which nothing is called a divergence."""
    page_excess: float = 0.35
    """Mean of that evidence a sample (sigmas over the reference): a level a little low can alarm, but never page."""
    page_samples: int = 50
    """Samples off the line before a page, unless they are already a twentieth of the run."""
    memory: int = 200
    """Samples the level of the run's own past remembers."""
    warm_up: int = 8
    """Samples before anything but a non-finite loss can be called."""
    recover: int = 16
    """Finite samples in a row that resolve LossNonFinite."""
    drift_sigmas: float = 3.5
    """Standard errors by which a slow drift must be past its tolerance."""
    drift_tolerance: float = 1.2
    """Standard deviations of the band by which the gap may move from the run's own early offset, same recipe."""
    far_tolerance: float = 2.0
    """The same for a prediction extrapolated from smaller runs, whose shape may be off as well as its level."""
    drift_least: float = 5.0
    """Standard deviations of the band under which no movement is called, however well it is measured."""
    band_sigmas: float = 7.0
    """Standard deviations of the band past which a run is off its prediction whatever its own offset."""
    twin_tolerance: float = 0.14
    """Sigmas of the run's own noise by which it may drift from a control of the same recipe."""

    def __post_init__(self) -> None:
        for name in ("warn", "warn_quick", "warn_control", "page", "drift_sigmas"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0; it is a height in sigmas")
        for name, least in (("memory", 20), ("warm_up", 4), ("page_samples", 2), ("recover", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} samples are too few; set at least {least}")
        if self.page <= self.warn:
            raise ValueError(
                f"page: {self.page} must be above warn: {self.warn}; a page is a warning that stayed"
            )
