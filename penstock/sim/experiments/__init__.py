"""What `penstock sim` runs: the papers' tables on the papers' hardware, and what goes beyond them."""
