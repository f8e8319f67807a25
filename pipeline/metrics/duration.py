"""A length of time as a person says it."""


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min, 4 d 3 h."""
    whole = round(seconds)
    for unit, size, lower, lower_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower_size:02d} {lower}"
    return f"{whole} s"
