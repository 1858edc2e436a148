"""Long lists, a page at a time."""


def page_count(items, size):
    """Number of pages that hold `items` things."""
    return (items + size - 1) // size


def page(things, number, size):
    """The things on a page; pages are counted from 1."""
    start = (number - 1) * size
    return things[start : start + size]
