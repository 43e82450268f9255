"""The fault campaign: real servers and workers, faults drawn from a seed, and a checker that trusts none of them."""
