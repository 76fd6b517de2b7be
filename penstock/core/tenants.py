"""Whose KV a request uses and fills: a tenant, and a salt within the tenant, written as one text.

Quotas count by tenant; blocks are shared only where the whole text is the same. Without keys that name tenants a
client's salt is the tenant.
"""

from __future__ import annotations

SEPARATOR = "\0"  # not allowed in a client's salt, so that no client can name another tenant


def tenant_and_salt(tenant: str, salt: str) -> str:
    """The text for a salt within a tenant. Without a salt it is the tenant, so that a tenant who gives none shares KV
    with engines that know the tenant as a plain salt; without a tenant it is the salt. Raises ValueError when either
    has the separator."""
    if SEPARATOR in tenant or SEPARATOR in salt:
        raise ValueError("a tenant or salt has a character of code 0")
    return f"{tenant}{SEPARATOR}{salt}" if tenant and salt else tenant or salt


def tenant_of(text: str) -> str:
    """The tenant in such a text: what quotas count by."""
    return text.partition(SEPARATOR)[0]
