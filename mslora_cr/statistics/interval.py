"""The ends of a confidence interval; apart from the arithmetic, which needs SciPy."""

Interval = tuple[float, float]
