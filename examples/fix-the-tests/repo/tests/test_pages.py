import unittest

from shop.pages import page, page_count


class PagesTest(unittest.TestCase):
    def test_full_pages(self):
        self.assertEqual(page_count(10, 5), 2)

    def test_started_page(self):
        self.assertEqual(page_count(11, 5), 3)

    def test_first_page(self):
        self.assertEqual(page(["a", "b", "c", "d", "e"], number=1, size=2), ["a", "b"])
