"""Activation steering for llama.cpp and GGUF models."""

__version__ = "0.1.0"
