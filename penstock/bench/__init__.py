"""`penstock bench`: measurements that an operator runs on his own machines."""
