"""`penstock doctor`: reports what this machine offers, what is misconfigured, and how to repair it."""
