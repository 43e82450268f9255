"""The tools of the person on call: what needs a hand is found, looked at and mended here, never by touching tables."""
