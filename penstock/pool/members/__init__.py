"""Members, which hold blocks: memory, and block devices with their index."""
