"""A sweep: several students from one memory bank, and the smallest one that passes the policy."""
