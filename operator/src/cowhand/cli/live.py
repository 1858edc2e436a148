"""What Claude is writing or thinking now, at the bottom of a terminal: the last lines, drawn over until they are final.

Only for terminals: what is drawn here is taken away again, and then the event itself is printed. Pure: previews in,
what to write out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cowhand.cli.render import MARGIN, safe

ROWS: Final = 6
"""Lines of a text that are shown."""


THINKING: Final = "┊ "
"""Stands before thinking."""


class Live:
    """See the module.

    Args:
        width: columns of the terminal.
    """

    def __init__(self, width: int) -> None:
        self._room = max(20, width - MARGIN - 1)
        self._block: tuple[int, int] = (0, 0)
        self._text = ""
        self._rows = 0

    def feed(self, preview: Mapping[str, Any]) -> str:
        """A preview of the raw log's stream; answers what to write."""
        block = (int(preview["start"]), int(preview["block"]))
        if block != self._block or not preview["offset"]:
            self._block, self._text = block, ""
        # What is above the shown lines is never needed again.
        self._text = (self._text + str(preview["text"]))[-2 * ROWS * self._room :]
        bar = THINKING if preview.get("kind") == "thinking" else ""
        room = self._room - len(bar)
        lines = [
            line[at : at + room]
            for line in safe(self._text).split("\n")
            for at in range(0, max(1, len(line)), room)
        ][-ROWS:]
        out = self.clear() + "".join(f"{' ' * MARGIN}{bar}{line}\n" for line in lines)
        self._rows = len(lines)
        return out

    def clear(self) -> str:
        """Takes the text away: an event comes, or the end."""
        rows, self._rows = self._rows, 0
        return f"\x1b[{rows}F\x1b[J" if rows else ""
