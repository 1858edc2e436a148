"""Prices of an order, in cents."""


def line_total(price, count):
    """Price of one line of an order."""
    return price * count


def order_total(lines, discount=0, shipping=0):
    """Price of an order: its lines without the discount, with shipping.

    `lines` are (price, count) pairs.
    """
    subtotal = sum(line_total(price, count) for price, count in lines)
    reduced = subtotal + discount
    return max(reduced, 0) + shipping
