"""What the panels of a picture share: a colour for each role, and ticks without exponents."""

import math

COLOURS = {
    "method": "#c0392b",
    "baseline": "#566164",
    "alternative": "#2471a3",
    "control": "#a57c00",
    "sweep": "#1e8449",
}


def plain_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2, 5 and their multiples by ten, more of them on a short axis, fewer on a long.

    Example:
      >>> plain_ticks(0.4, 12)
      [0.5, 1.0, 2.0, 5.0, 10.0]
    """
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [float(f"{step * 10.0**power:.6g}") for power in powers for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 4:
            return found
    return found


def plain(tick: float) -> str:
    """A tick's label without exponents.

    Example:
      >>> plain(0.05), plain(2.0), plain(20000.0)
      ('0.05', '2', '20,000')
    """
    return f"{tick:,.10f}".rstrip("0").rstrip(".")


def plain_axis(axis, low: float, high: float, *, log: bool) -> None:
    """Give an axis tick labels without exponents and offsets."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    if log:
        axis.set_major_locator(FixedLocator(plain_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: plain(tick)))
