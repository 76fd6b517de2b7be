"""`penstock doctor`: says in plain words what is there, what is misconfigured, and what to do about it."""
