"""The tab."""


def build() -> None: ...
