"""DualPath: prefill and decode on different hosts read over both storage NICs; live and simulated."""
