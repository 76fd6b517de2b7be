"""Two systems and the same requests over HTTP: the picture of the README."""
