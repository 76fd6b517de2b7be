"""The scheduler core inside another engine: loads and saves of a KV connector."""
