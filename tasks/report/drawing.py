"""Render figures as SVG for reports, and as PNG for the folders of research commands.

Figures use the colours of `COLOURS`. In a page these become CSS variables, so that a plot suits
light mode, dark mode and print; in a file of its own they stay. Text stays text. All identifiers
contain the plot's name, so that several plots fit into one page. The bytes depend only on the
figure and the versions of the libraries.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

# The CSS variable of each colour, and its value on white. Series differ by shape or text too; the
# hues follow Okabe and Ito, which readers with colour blindness can tell apart.
COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636f",
    "grid": "#dfe3e8",
    "stripe": "#f3f5f8",
    "blue": "#0068a8",
    "orange": "#d97f00",
    "green": "#00855f",
    "red": "#c4420b",
    "pink": "#b8558f",
    "sky": "#3f9fd6",
    "grey": "#808a96",
}

_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "text.parse_math": False,  # a dollar sign in a name is literal
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": "none",
    "axes.labelcolor": COLOURS["muted"],
    "axes.labelsize": 8.0,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "xtick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "xtick.labelsize": 8.0,
    "ytick.color": COLOURS["grid"],
    "ytick.labelcolor": COLOURS["ink"],
    "ytick.labelsize": 8.0,
}
# In inches: a phone shows this width without shrinking the text.
WIDTH = 4.8
_POINTS_PER_INCH, _PIXELS_PER_INCH = 72.0, 96.0
_PNG_DPI = 144
_FONT = "DejaVu Sans, sans-serif"
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_UNWANTED = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<style[^>]*>.*?</style>", re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: a short name without spaces; files are named after it.
        title: its caption.
        description: the plot in words, for screen readers.
        figure: a `matplotlib.figure.Figure`.
    """

    name: str
    title: str
    description: str
    figure: Any

    @property
    def is_wide(self) -> bool:
        """True if it needs more than the usual width."""
        return bool(self.figure.get_size_inches()[0] > 1.1 * WIDTH)


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Set up matplotlib for the plot of this name, independent of the user's own settings."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        # The browser has fonts for glyphs that DejaVu lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update({**_SETTINGS, "svg.hashsalt": f"restitch {name}"})
        yield


def axes_in(
    height: float,
    *,
    left: float,
    top: float,
    bottom: float,
    right: float = 0.14,
    width: float | None = None,
) -> tuple[Any, Any]:
    """A figure with one pair of axes of a height and width, and margins; all in inches.

    Without a width of the axes, the figure has the common width.
    """
    from matplotlib.figure import Figure

    width = WIDTH - left - right if width is None else width
    size = (left + width + right, bottom + height + top)
    figure = Figure(figsize=size)
    place = (left / size[0], bottom / size[1], width / size[0], height / size[1])
    return figure, figure.add_axes(place)


def room(names: Sequence[str]) -> float:
    """The width in inches of the longest label."""
    return 0.2 + 0.067 * max((len(label(name)) for name in names), default=0)


def label(text: str, longest: int = 20) -> str:
    """A text as a label: on one line, without control characters, shortened in the middle."""
    text = _UNPRINTABLE.sub(" ", text)
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[: longest - 1 - half]}…{text[-half:]}"


def to_png(plot: Plot) -> bytes:
    """Render the plot as PNG on white."""
    stream = io.BytesIO()
    with drawing(plot.name):
        plot.figure.savefig(
            stream, format="png", dpi=_PNG_DPI, facecolor="white", metadata={"Software": None}
        )
    return stream.getvalue()


def to_svg(plot: Plot) -> Markup:
    """Render the plot as an inline SVG element."""
    stream = io.StringIO()
    with drawing(plot.name):
        plot.figure.savefig(stream, format="svg", metadata=_NO_METADATA)
    drawn = stream.getvalue()
    inner = drawn[drawn.index(">", drawn.index("<svg")) + 1 : drawn.rindex("</svg>")]
    inner = _UNWANTED.sub("", inner)
    inner = re.sub(r' id="[A-Za-z.]+_[0-9]+"', "", inner)  # ids of groups, which nothing refers to
    inner = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{plot.name}-", inner)
    inner = inner.replace("xlink:href", "href")
    inner = re.sub(r"(font: [^;\"]*?px )[^;\"]+", r"\1var(--font)", inner)
    for name, colour in COLOURS.items():
        inner = inner.replace(colour, f"var(--{name})")
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    width, height = (side * _POINTS_PER_INCH for side in plot.figure.get_size_inches())
    shown = width / _POINTS_PER_INCH * _PIXELS_PER_INCH
    title, text = f"{plot.name}-title", f"{plot.name}-description"
    return Markup(
        f'<svg role="img" aria-labelledby="{title} {text}" viewBox="0 0 {width:g} {height:g}" '
        f'style="--width: {shown:g}px"><title id="{title}">{escape(plot.title)}</title>'
        f'<desc id="{text}">{escape(plot.description)}</desc>{inner}</svg>'
    )


def to_file(inline: Markup) -> bytes:
    """An SVG file, on white, of an element that `to_svg` made."""
    drawn = str(inline)
    for name, colour in {**COLOURS, "font": _FONT}.items():
        drawn = drawn.replace(f"var(--{name})", colour)
    size = re.search(r'viewBox="0 0 ([0-9.e+-]+) ([0-9.e+-]+)" style="[^"]*"', drawn)
    assert size is not None
    width, height = (float(side) / _POINTS_PER_INCH * _PIXELS_PER_INCH for side in size.groups())
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
    start += ' stroke-linejoin="round"'
    drawn = drawn.replace(size[0], size[0].partition(" style=")[0], 1)
    drawn = drawn.replace("<svg", start, 1)
    drawn = drawn.replace("</desc>", '</desc><rect width="100%" height="100%" fill="white"/>', 1)
    return drawn.encode()
