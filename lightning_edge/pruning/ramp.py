"""When cuts are due and how far each goes: from nothing at the start to the whole target at the end. No torch here."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_edge.schedule import Clock, Moment, check_moment, check_order

Schedule = Literal["linear", "cubic"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


class Ramp:
    """The moments at which a network is cut, and the share of the whole cut that is made by each.

    Between ``start`` and ``end``, ``linear`` removes at an even pace and ``cubic`` quickly at first, as
    1 - (1 - t)³ (Zhu & Gupta 2017, arXiv:1710.01878). Both have removed nothing at ``start`` itself and everything at
    ``end``; without ``end`` all is removed at ``start``.

    Args:
        start: When the ramp begins.
        end: When it ends; ``None``: one cut, at ``start``.
        every: How far apart cuts are, in the kind of number that ``start`` is; ``None``: an epoch.
        schedule: The ramp's form.

    Raises:
        ValueError: If a moment is none, they are not of one kind, or in the wrong order.
    """

    def __init__(self, start: Moment, end: Moment | None, every: Moment | None, schedule: Schedule) -> None:
        self.start = check_moment("start", start)
        self.end = start if end is None else check_moment("end", end)
        check_order("start", start, "end", self.end)
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is none of {', '.join(map(repr, SCHEDULES))}")
        if type(self.end) is not type(start):
            raise ValueError(
                f"start={start!r} and end={end!r} must be of one kind: both epochs (whole numbers from 0 on) or both "
                "fractions of training (0.0 to 1.0)"
            )
        if every is not None:
            if end is None:
                raise ValueError(f"every={every!r} needs an end; give end=..., or leave every out for a single cut")
            check_moment("every", every)
            if type(every) is not type(start) or every == 0:
                raise ValueError(
                    f"every={every!r} must be above zero and of the kind of start={start!r}: whole epochs, or a "
                    "fraction of training"
                )
        self.every = every
        self.schedule = schedule

    def due(self, clock: Clock, last: float, last_epoch: int | None) -> float | None:
        """Give how far along the ramp a cut is due, above 0.0 up to 1.0; ``None`` if none is.

        Args:
            clock: Where training stands.
            last: How far along the ramp the last cut was; 0.0 before the first.
            last_epoch: In which epoch that was; ``None`` before the first.
        """
        if last >= 1.0 or not clock.reached(self.start):
            return None
        if clock.reached(self.end):
            return 1.0
        length = self.end - self.start
        every = 1 if self.every is None and isinstance(self.start, int) else self.every
        if every is not None:
            # The moments are counted, so that the same ones come whatever batch they are asked at.
            steps = int(last * length / every + 1e-6)
            while clock.reached(self._moment(steps + 1, every)):
                steps += 1
            along = min(1.0, steps * every / length)
        else:
            if (last_epoch is not None and clock.epoch <= last_epoch) or clock.progress is None:
                return None
            along = (clock.progress - self.start) / length
        return along if along > last + 1e-9 else None

    def _moment(self, step: int, every: Moment) -> Moment:
        moment = self.start + step * every
        return moment if isinstance(moment, int) else min(1.0, moment)

    def removed(self, along: float) -> float:
        """Give the share of the whole cut that is made when the ramp has come ``along`` so far, 0.0 to 1.0."""
        return along if self.schedule == "linear" else 1.0 - (1.0 - along) ** 3
