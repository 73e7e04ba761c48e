"""Vector file formats of other programs, one module for each. docs/formats.md says what each of them can hold.

Readers trust nothing: sizes are bounded before anything is allocated, no pickle is loaded, no expression evaluated, and
a file is read as a whole or refused with one sentence.
"""

from __future__ import annotations

from ..formats import Format


def builtin_formats() -> list[Format]:
    """The formats of this package, in the order in which a file is tried against them."""
    from . import controlvector, ds4, ds41, glp, neuronpedia, npz, sae, svec, torchfile

    return [
        controlvector.FORMAT,
        glp.FORMAT,
        ds4.FORMAT,
        ds41.FORMAT,
        svec.FORMAT,
        sae.SAELENS,
        sae.GEMMA_SCOPE,  # before npz, which it looks like
        npz.FORMAT,
        torchfile.FORMAT,
        neuronpedia.FORMAT,
    ]
