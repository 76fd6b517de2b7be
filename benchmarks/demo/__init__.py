"""Two systems serve the same requests over HTTP: the picture of the README."""
