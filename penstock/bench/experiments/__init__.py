"""Experiments: each module measures one claim and is one sub-command of `penstock bench`."""
