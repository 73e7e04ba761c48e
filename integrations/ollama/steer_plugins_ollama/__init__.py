"""The Ollama sidecar's place. It is not written yet: this package registers nothing, and `steer` has no `ollama` command."""
