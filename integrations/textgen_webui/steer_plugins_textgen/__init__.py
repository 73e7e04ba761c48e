"""Steering in text-generation-webui: an extension that uses the model that is loaded there.

The webui runs ``script.py``, whose one line imports :mod:`steer_plugins_textgen.extension`. Nothing of the webui, of gradio or
of torch is imported before the webui has done so itself: portable builds have no torch, API-only mode has no gradio.
See docs/textgen.md.
"""
