"""A machine made of the files that a test lays out."""

from penstock.doctor.machine import Machine


class Laid(Machine):
    """A machine made of the files that a test lays out."""

    def lay(self, path: str, text: str = "") -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
