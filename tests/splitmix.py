"""The generator behind all that is drawn, by its publication: what was drawn for a seed stays what it was, because
states of loaders, stores of errors and people's results count on it."""


def outputs(seed, count):
    """SplitMix64's (Steele, Lea and Flood 2014): the first numbers of a seed."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        found.append(z ^ z >> 31)
    return found


def chained(*numbers):
    """What it gives first for the last number, added to what it gives for those before."""
    state = 0
    for number in numbers:
        (state,) = outputs(state + number, 1)
    return state
