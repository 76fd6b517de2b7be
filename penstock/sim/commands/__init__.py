"""The sub-commands of `penstock sim`."""
