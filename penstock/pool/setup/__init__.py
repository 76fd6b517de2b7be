"""From files and flags to an open pool, and the commands around one."""
