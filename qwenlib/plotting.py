"""Figure style shared by all notebooks."""

from __future__ import annotations

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
