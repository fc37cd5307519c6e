"""Figure style shared by all notebooks."""

from __future__ import annotations

import io

# Colour-blind-safe (Okabe and Ito, 2008), dark enough for text on white.
palette: tuple[str, ...] = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # green
    "#CC79A7",  # purple
    "#E69F00",  # orange
    "#56B4E9",  # sky
    "#6B6B6B",  # grey
    "#000000",  # black
)

# Largest change of a colour (of 255 levels) that small_png may make; no eye sees it.
MAX_CHANGE = 12


def style() -> None:
    """Set the seaborn theme, the palette and the figure sizes used in every chapter."""
    import seaborn as sns

    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(palette),
        rc={
            "figure.figsize": (7.0, 3.8),
            "figure.dpi": 96,
            "savefig.dpi": 96,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "legend.frameon": False,
            "grid.color": "#E4E4E4",
            "image.cmap": "viridis",
        },
    )


def small_png(png: bytes) -> bytes:
    """The picture in 256 colours, about a third of the bytes; `png` itself where that would show.

    It would where a pixel changes by more than MAX_CHANGE (smooth colours in many hues), or where
    the picture is partly transparent.
    """
    from PIL import Image, ImageChops

    picture = Image.open(io.BytesIO(png))
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() != (255, 255):
        return png
    full = picture.convert("RGB")
    # MAXCOVERAGE keeps rare colours, and one k-means pass then settles the frequent ones.
    small = full.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    change = ImageChops.difference(full, small.convert("RGB"))
    if max(highest for _, highest in change.getextrema()) > MAX_CHANGE:
        return png
    buffer = io.BytesIO()
    small.save(buffer, format="png", optimize=True, dpi=picture.info.get("dpi"))
    return buffer.getvalue()
