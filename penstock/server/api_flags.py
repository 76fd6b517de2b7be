"""Titles of the help sections shared by all commands with an OpenAI-compatible API."""

API, LIMITS, CLUSTER = "API", "Limits and deadlines", "Cluster"

API_FLAGS = (
    *("model", "host", "port", "api_key", "api_key_file", "api_keys", "require_tenant", "hide_cached_tokens"),
    *(
        "open_metrics",
        "otlp_endpoint",
        "allowed_host",
        "tls_cert",
        "tls_key",
        "cors_origin",
        "served_model_name",
        "revision",
    ),
)
API_LIMITS = ("keep_alive_s", "request_timeout_s", "drain_timeout_s")
