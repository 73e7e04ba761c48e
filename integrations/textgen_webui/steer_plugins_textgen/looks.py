"""Styles of the tab. Colours come from the webui's own variables, so that both themes fit."""

CSS = ""
