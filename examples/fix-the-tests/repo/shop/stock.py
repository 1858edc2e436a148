"""What is in stock."""


def can_ship(on_hand, ordered):
    """Whether an order can be sent at once."""
    return on_hand >= ordered


def to_reorder(stock, minimum):
    """Names of articles of which fewer than `minimum` are left, in order."""
    return sorted(name for name, count in stock.items() if count < minimum)
