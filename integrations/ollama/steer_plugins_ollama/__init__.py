"""Steering for Ollama: a sidecar that speaks Ollama's API and runs steered models on a steering llama-server.

The parts, each knowing only those above it: :mod:`names`, :mod:`modelfile`, :mod:`gotemplate`, :mod:`expression` (no I/O);
:mod:`gguf`, :mod:`model`, :mod:`store`, :mod:`folder` (models on disk); :mod:`pool`, :mod:`llama` (llama-server processes and
what they say); :mod:`daemon`, :mod:`creating`, :mod:`service`; :mod:`calls`, :mod:`openai`, :mod:`manage`, :mod:`app` (the HTTP
surface); :mod:`client`, :mod:`install`, :mod:`plugin` (the commands).
"""
