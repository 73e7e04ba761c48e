"""From a system prompt to a vector that does what the prompt does: imitated token by token, by forward passes alone.

After prompt-imitating responsive steering (arXiv 2605.03907).
"""

from .imitation import ARMS, ImitateOptions, Imitation, Share
from .prompt import load_prompt

__all__ = ["ARMS", "ImitateOptions", "Imitation", "Share", "load_prompt"]
