import unittest

from shop.prices import line_total, order_total


class PricesTest(unittest.TestCase):
    def test_line_total(self):
        self.assertEqual(line_total(250, 4), 1000)

    def test_order_without_discount(self):
        self.assertEqual(order_total([(100, 2), (50, 1)], shipping=30), 280)

    def test_order_with_discount(self):
        self.assertEqual(order_total([(100, 2), (50, 1)], discount=25), 225)
