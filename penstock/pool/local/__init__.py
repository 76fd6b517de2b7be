"""One host's members as one pool: the table of blocks, space, pinned blocks, drains."""
