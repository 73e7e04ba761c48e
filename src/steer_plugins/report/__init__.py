"""Pictures of activations: how far each token of a text lies along a vector's direction, before and after steering.

``inspect_prompt`` measures with any engine and gives an :class:`Inspection`, which is plain data; ``to_html``, ``to_page``,
``to_terminal`` and ``to_png`` draw it. HTML needs nothing but Python and numpy, the PNG needs matplotlib.
"""

from __future__ import annotations

from .inspection import Inspection, Reading, inspect_prompt, neutral_levels
from .page import to_html, to_page
from .png import to_png
from .terminal import to_terminal

__all__ = ["Inspection", "Reading", "inspect_prompt", "neutral_levels", "to_html", "to_page", "to_png", "to_terminal"]
