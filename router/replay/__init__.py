"""A trace through the router's policies under a virtual clock: what would hit, who would work, what would be late."""
