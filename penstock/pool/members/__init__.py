"""What holds blocks: memory, and block devices with their index."""
