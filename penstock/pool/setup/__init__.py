"""Opens a pool from files and flags, and the commands around it."""
