"""The text-generation-webui extension's place. It is not written yet: this package registers nothing."""
