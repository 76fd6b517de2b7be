"""Front processes of a router: each serves HTTP clients, and one placer decides for all of them."""
