"""Draws the pictures of ``docs/kernels.md`` into ``docs/images``.

    python docs/draw_kernels.py

Plain SVG. Each picture has its own background, and colours for a light and for a dark screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path

IMAGES = Path(__file__).with_name("images")

# Colour of the paper, the ink, faint lines, then one for each pair of taps and one for the centre.
LIGHT = ["#ffffff", "#1f2328", "#8c959f", "#56b4e9", "#e69f00", "#3fb58a", "#d98cc0", "#c3c9d0"]
DARK = ["#161b22", "#e6edf3", "#768390", "#1f6fa8", "#a06a00", "#1d7a58", "#8f4a78", "#4d5661"]
CENTRE = 4  # the colour after those of the four pairs
CHANNELS, SIDE = 3, 3  # of the weight that is drawn


def places(channels: int, taps: int) -> list[list[list[int]]]:
    """For each tap, out- and in-channel the place in the packed vector, for s = +1."""
    pairs, square = taps // 2, channels**2
    dense = [[[0] * channels for _ in range(channels)] for _ in range(taps)]
    for i in range(channels):
        for j in range(channels):
            for tap in range(pairs):
                place = tap * square + i * channels + j
                dense[tap][i][j] = dense[taps - 1 - tap][j][i] = place
            if taps % 2:
                low, high = min(i, j), max(i, j)
                dense[pairs][i][j] = pairs * square + high * (high + 1) // 2 + low
    return dense


class Drawing:
    """Shapes in the order in which they are drawn, on a sheet of a size."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, look: str = "line") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{look}"/>'
        )

    def text(
        self, x: float, y: float, text: str, look: str = "", at: str = "middle", turn: int = 0
    ) -> None:
        options = f'text-anchor="{at}"' + (f' class="{look}"' if look else "")
        options += f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {options}>{escape(text)}</text>')

    def title_at(self, x: float, y: float, text: str) -> None:
        self.text(x, y, text, "title", "start")

    def notes(self, x: float, y: float, lines: list[str], look: str = "small") -> None:
        """Lines of text, one below the other."""
        for i, line in enumerate(lines):
            self.text(x, y + i * 18, line, look, "start")

    def line(self, *points: tuple[float, float], look: str = "line") -> None:
        joined = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{joined}" class="{look}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line with a head at its last point."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        sides = [(x1 - 8 * math.cos(angle + a), y1 - 8 * math.sin(angle + a)) for a in (0.4, -0.4)]
        self.line(*points)
        self.line(sides[0], (x1, y1), sides[1], look="head")

    def grid(self, x: float, y: float, rows: int, columns: int, cell: float, look: str) -> None:
        for row in range(rows):
            for column in range(columns):
                self.box(x + column * cell, y + row * cell, cell, cell, look)

    def svg(self) -> str:
        size = f'width="{self.width}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}"'
        style = (
            f"{RULES}{colours(LIGHT)}\n@media (prefers-color-scheme: dark) {{{colours(DARK)}\n}}"
        )
        return "\n".join(
            [
                f'{head} {size} role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{style}\n</style>",
                f'<rect {size} rx="8" class="paper"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


RULES = """
text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
.small { font-size: 11px; }
.title { font-weight: bold; }
polyline { fill: none; }
.dead { fill: none; stroke-dasharray: 2 2; }
.thick { stroke-width: 3; fill: none; }
.line { fill: none; }"""


def colours(palette: list[str]) -> str:
    paper, ink, faint, *fills = palette
    rules = [
        f".paper {{ fill: {paper}; }}",
        f"text, .head {{ fill: {ink}; }}",
        f"rect, polyline {{ stroke: {ink}; }}",
        f".dead, .faint {{ stroke: {faint}; }}",
        f".faint {{ fill: {paper}; }}",
        ".paper { stroke: none; }",
    ]
    for i, fill in enumerate(fills):
        rules.append(f".fill{i} {{ fill: {fill}; }}")
        rules.append(f".tint{i} {{ fill: {fill}; fill-opacity: 0.3; }}")
    return "".join(f"\n{rule}" for rule in rules)


def packed() -> Drawing:
    """Which numbers of a dense weight are stored, and where."""
    drawing = Drawing(
        720, 400, "A dense weight of 3 channels and a 3x3 kernel, and its packed vector"
    )
    taps, cell = SIDE**2, 24
    drawing.title_at(20, 28, "Dense weight: nine taps, each a matrix of 3 out- by 3 in-channels")
    for tap, matrix in enumerate(places(CHANNELS, taps)):
        x, y = 40 + tap % SIDE * 104, 64 + tap // SIDE * 96
        colour = min(tap, taps - 1 - tap)
        drawing.text(x + 36, y - 6, f"tap {tap}", "small")
        for i, row in enumerate(matrix):
            for j, place in enumerate(row):
                stored = tap < taps // 2 or (tap == taps // 2 and j <= i)
                look = f"{'fill' if stored else 'tint'}{colour}"
                tile(drawing, x + j * cell, y + i * cell, cell, cell, look, str(place))
    drawing.notes(
        390,
        70,
        [
            "The number in a cell is its place",
            "in the packed vector.",
            "",
            "Full colour: stored there.",
            "Faint colour: the same numbers again.",
            "",
            "Tap 8 is tap 0 transposed,",
            "tap 7 is tap 1 transposed, ...",
            "The centre tap is its own opposite:",
            "its lower triangle is stored.",
            "",
            "Skew-adjoint: the faint ones change",
            "sign. The diagonal of the centre tap",
            "is zero and not stored.",
        ],
        "",
    )
    drawing.title_at(20, 366, "Packed: 42 numbers instead of 81")
    bar_of_packed(drawing, 270, 350, 430, 22)
    return drawing


def bar_of_packed(drawing: Drawing, x: float, y: float, width: float, height: float) -> None:
    """The parts of a packed vector, with the place where each begins."""
    sizes = [CHANNELS**2] * (SIDE**2 // 2) + [CHANNELS * (CHANNELS + 1) // 2]
    start = 0
    for colour, size in enumerate(sizes):
        left, share = x + width * start / sum(sizes), width * size / sum(sizes)
        name = f"tap {colour}" if colour < CENTRE else "centre"
        tile(drawing, left, y, share, height, f"fill{colour}", name)
        drawing.text(left + 2, y + height + 14, str(start), "small", "start")
        start += size


def taps() -> Drawing:
    """Opposite taps of one output pixel, and one tile of weights used twice."""
    drawing = Drawing(720, 330, "One weight tile serves two opposite taps")
    cell, x0, y0 = 44, 30, 60
    drawing.title_at(20, 28, "Pixels that one output pixel reads")
    drawing.grid(x0, y0, 5, 5, cell, "faint")
    for tap in range(SIDE**2):
        x, y = x0 + (1 + tap % SIDE) * cell, y0 + (1 + tap // SIDE) * cell
        drawing.box(x, y, cell, cell, f"fill{min(tap, SIDE**2 - 1 - tap)}")
        drawing.text(x + cell / 2, y + cell / 2 + 4, f"{tap}")
    drawing.box(x0 + 2 * cell, y0 + 2 * cell, cell, cell, "thick")
    drawing.notes(
        x0,
        y0 + 5 * cell + 20,
        ["Thick: the output pixel.", "Same colour: opposite taps, t and 8 - t."],
    )

    drawing.title_at(300, 28, "One step of the loop, for the pair of taps 1 and 7")
    tile(drawing, 310, 130, 70, 70, "fill1", "weights", "of tap 1")
    drawing.text(345, 222, "out x in", "small")
    drawing.text(345, 238, "read once", "small")
    for y, tap, way in ((64, 1, "as it stands"), (206, 7, "transposed")):
        drawing.arrow((384, 165), (420, 165), (420, y + 25), (478, y + 25))
        drawing.text(430, y + 17 if tap == 1 else y + 43, way, "small", "start")
        tile(drawing, 512, y, 96, 50, "fill1", f"pixels at tap {tap}", "")
        drawing.text(494, y + 30, "\u00d7")
        drawing.arrow((612, y + 25), (660, y + 25), (660, 138 if tap == 1 else 192))
    tile(drawing, 632, 142, 56, 46, "faint", "sum", "")
    drawing.notes(310, 280, ["sum: output pixels x out-channels, in float32"])
    return drawing


def tile(drawing: Drawing, x: float, y: float, w: float, h: float, look: str, *lines: str) -> None:
    """A box with lines of text in it."""
    drawing.box(x, y, w, h, look)
    shown = [line for line in lines if line]
    for i, line in enumerate(shown):
        drawing.text(x + w / 2, y + h / 2 + 4 + (i - (len(shown) - 1) / 2) * 15, line, "small")


def boxes() -> Drawing:
    """Images cut into boxes of pixels, and the pixels of a box that are in vain."""
    drawing = Drawing(720, 330, "Boxes of pixels")
    cell = 26
    drawing.title_at(20, 28, "One 7x7 image,")
    drawing.title_at(20, 46, "boxes of 1x4x4")
    cut(drawing, 24, 70, (7, 7), (4, 4), cell)
    drawing.notes(24, 300, ["4 boxes, 64 places, 49 pixels:", "15 dead, 23%"])

    drawing.title_at(270, 28, "Four 2x2 images,")
    drawing.title_at(270, 46, "boxes of 1x4x4 or 4x2x2")
    for image in range(4):
        cut(drawing, 274 + image % 2 * 60, 70 + image // 2 * 60, (2, 2), (4, 4), 13)
    for image in range(4):
        x, y = 408 + image % 2 * 40, 82 + image // 2 * 40
        drawing.grid(x, y, 2, 2, 15, "fill4")
    drawing.box(402, 76, 82, 82, "thick")
    drawing.notes(274, 206, ["4 boxes,", "75% dead"])
    drawing.notes(402, 206, ["1 box,", "none dead"])

    drawing.title_at(530, 28, "A tap moves the box")
    drawing.grid(556, 84, 5, 5, cell, "faint")
    drawing.box(556, 84, 3 * cell, 3 * cell, "thick")
    for row in range(3):
        for column in range(3):
            dead = row == 0 or column == 0
            x, y = 556 + (column - 1) * cell, 84 + (row - 1) * cell
            drawing.box(x, y, cell, cell, "dead" if dead else "fill0")
            if dead:
                drawing.text(x + cell / 2, y + 17, "0", "small")
    drawing.notes(
        530,
        246,
        [
            "Thick: a box of the output.",
            "Tap 0 reads one row higher and",
            "one column to the left. Outside",
            "the image it reads zeros.",
        ],
    )
    return drawing


def cut(
    drawing: Drawing, x: float, y: float, image: tuple[int, int], box: tuple[int, int], cell: float
) -> None:
    """An image cut into boxes: thick lines around each, dashes beyond the image."""
    counts = [math.ceil(size / side) for size, side in zip(image, box, strict=True)]
    for row in range(counts[0] * box[0]):
        for column in range(counts[1] * box[1]):
            live = row < image[0] and column < image[1]
            drawing.box(x + column * cell, y + row * cell, cell, cell, "fill4" if live else "dead")
    for row in range(counts[0]):
        for column in range(counts[1]):
            size = (box[1] * cell, box[0] * cell)
            drawing.box(x + column * size[0], y + row * size[1], *size, "thick")


def roles() -> Drawing:
    """The two orders of the operands of a matrix product."""
    drawing = Drawing(720, 300, "Two orders of the operands")
    drawing.title_at(20, 28, "Pixels first")
    matrix(drawing, 38, 60, 56, 150, "fill4", "x", "pixels", "in")
    drawing.text(112, 140, "\u00d7")
    matrix(drawing, 146, 107, 80, 56, "fill1", "weights", "in", "out")
    drawing.text(246, 140, "=")
    matrix(drawing, 282, 60, 80, 150, "faint", "y", "pixels", "out")
    drawing.notes(
        20,
        244,
        ["For boxes of one row, (1, 1, W): on sm_90 both", "operands stay in shared memory."],
    )
    drawing.title_at(390, 28, "Weights first")
    matrix(drawing, 408, 80, 56, 80, "fill1", "weights", "out", "in")
    drawing.text(480, 124, "\u00d7")
    matrix(drawing, 512, 92, 84, 56, "fill4", "x", "in", "pixels")
    drawing.text(612, 124, "=")
    matrix(drawing, 638, 80, 72, 80, "faint", "y", "out", "pixels")
    drawing.notes(
        390,
        226,
        [
            "For boxes of several rows: as the second operand",
            "they stay in shared memory too. Wants tiles of",
            "64 out-channels or more. The sum is transposed",
            "once, at the end.",
        ],
    )
    return drawing


def matrix(
    drawing: Drawing,
    x: float,
    y: float,
    w: float,
    h: float,
    look: str,
    name: str,
    rows: str,
    columns: str,
) -> None:
    """A box with its name in it, and beside its sides what its rows and columns are."""
    tile(drawing, x, y, w, h, look, name)
    drawing.text(x + w / 2, y - 6, columns, "small")
    drawing.text(x - 6, y + h / 2, rows, "small", turn=-90)


def gradient() -> Drawing:
    """Which products land where in the packed gradient, and how splits are added."""
    drawing = Drawing(720, 420, "The packed gradient")
    drawing.title_at(
        20, 28, "1. For each pair of taps, here 1 and 7: two products, summed in one tile"
    )
    y = 46
    tile(drawing, 30, y, 100, 46, "fill4", "output gradient", "out x pixels")
    drawing.text(146, y + 28, "\u00d7")
    tile(drawing, 162, y, 100, 46, "fill1", "pixels at tap 1", "pixels x in")
    drawing.text(284, y + 28, "+ s")
    tile(drawing, 306, y, 100, 46, "fill1", "pixels at tap 7", "out x pixels")
    drawing.text(422, y + 28, "\u00d7")
    tile(drawing, 438, y, 100, 46, "fill4", "output gradient", "pixels x in")
    drawing.text(558, y + 28, "=")
    tile(drawing, 580, y, 110, 46, "fill1", "gradient of tap 1", "out x in")
    drawing.notes(30, y + 66, ["Tap 7 is not stored. Its gradient is the second product."])

    drawing.title_at(20, 160, "2. Splits share the pixels: boxes are dealt to them in turn")
    for name, y, number in (("box", 176, 0), ("split", 204, 3)):
        drawing.text(100, y + 16, name, "small", "end")
        for box in range(9):
            shown = str(box % number if number else box)
            tile(drawing, 110 + box * 36.7, y, 36.7, 24, "faint", shown)

    drawing.title_at(
        20, 268, "3. Each split writes its own row; the rows are added in a fixed order"
    )
    for split in range(3):
        y = 284 + split * 26
        drawing.text(100, y + 16, f"split {split}", "small", "end")
        row_of_packed(drawing, 110, y, 330, 22)
    drawing.arrow((275, 362), (275, 378))
    drawing.text(100, 398, "gradient", "small", "end")
    row_of_packed(drawing, 110, 382, 330, 22)
    drawing.notes(
        464,
        300,
        [
            "No two programs write to one place,",
            "and the order of all sums is fixed:",
            "the result is the same each time.",
            "The centre tap is a pair with itself:",
            "its diagonal is halved, and its",
            "upper triangle is not written.",
        ],
    )
    return drawing


def row_of_packed(drawing: Drawing, x: float, y: float, width: float, height: float) -> None:
    share = width / 4.67
    for colour in range(5):
        name = f"tap {colour}" if colour < CENTRE else "centre"
        w = share if colour < CENTRE else width - 4 * share
        tile(drawing, x + colour * share, y, w, height, f"fill{colour}", name)


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "kernels-packed.svg": packed,
    "kernels-taps.svg": taps,
    "kernels-boxes.svg": boxes,
    "kernels-roles.svg": roles,
    "kernels-gradient.svg": gradient,
}


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (IMAGES / name).write_text(draw().svg())


if __name__ == "__main__":
    main()
