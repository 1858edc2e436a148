import unittest

from shop.stock import can_ship, to_reorder


class StockTest(unittest.TestCase):
    def test_enough(self):
        self.assertTrue(can_ship(on_hand=7, ordered=5))

    def test_exactly_enough(self):
        self.assertTrue(can_ship(on_hand=5, ordered=5))

    def test_too_few(self):
        self.assertFalse(can_ship(on_hand=4, ordered=5))

    def test_reorder(self):
        self.assertEqual(to_reorder({"tea": 3, "milk": 1, "salt": 9}, minimum=4), ["milk", "tea"])
